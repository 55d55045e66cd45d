"""The card of a trained LoRA: what it is, how it was made and measured, and how to use it."""

import csv
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from spo.config import Config
from spo.config.base import Section
from spo.report.results import BASE
from spo.runtime import hub
from spo.workspace import Workspace

PAPERS = {
    "spo": "Step-aware Preference Optimization ([arXiv 2406.04314](https://arxiv.org/abs/2406.04314))",
    "d3po": "D3PO ([arXiv 2311.13231](https://arxiv.org/abs/2311.13231))",
    "diffusion_dpo": "Diffusion-DPO ([arXiv 2311.12908](https://arxiv.org/abs/2311.12908))",
    "grpo": "GRPO on whole trajectories ([arXiv 2505.05470](https://arxiv.org/abs/2505.05470))",
}
SAMPLES = "samples.png"


def model_card(config: Config, method: str | None, *, root: Path = Path(), license: str | None = None) -> str:
    """README.md of a folder that diffusers loads as a LoRA; with the results of `method` if it was evaluated."""
    base = config.model.path
    data = ModelCardData(
        base_model=base if hub.is_name(base) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license,
        tags=["lora", "text-to-image", "diffusers", config.model.family, *([method] if method else [])],
    )
    title = f"{method or 'A LoRA'} on {Path(base).name if not hub.is_name(base) else base}"
    sections = [f"---\n{data.to_yaml()}\n---", f"# {title}", _what(config, method)]
    if method is not None:
        sections += [*_results(config, method, root), *_training(config, method)]
    return "\n\n".join([*sections, _use(config)]) + "\n"


def _what(config: Config, method: str | None) -> str:
    made = f", trained by {PAPERS[config.align[method].method]} to produce images that people prefer" if method else ""
    return f"A LoRA for `{config.model.path}`{made}."


def _results(config: Config, method: str, root: Path) -> list[str]:
    """A table of the deciding sampler, and the sheet of samples; nothing where the evaluation's tables are missing."""
    evaluated, sampler = Workspace(config, root).evaluate, config.evaluate.deciding
    means = [row for row in _rows(evaluated / "means.csv") if row["sampler"] == sampler]
    gains = [row for row in _rows(evaluated / "comparisons.csv") if row["sampler"] == sampler]
    mean = {(row["column"], row["metric"]): row for row in means}
    against_base = {row["metric"]: row for row in gains if (row["column"], row["against"]) == (method, BASE)}
    if not against_base:
        return []
    lines = ["| score | base | this LoRA | difference | images won against the base |", "|---|---|---|---|---|"]
    for metric, gain in against_base.items():
        scores = [f"{float(mean[column, metric]['mean']):.3f}" for column in (BASE, method)]
        difference = f"{float(gain['difference']):+.3f} [{float(gain['low']):+.3f}, {float(gain['high']):+.3f}]"
        shares = [f"{float(gain[key]):.0%}" for key in ("win_rate", "win_rate_low", "win_rate_high")]
        lines.append(f"| {metric} | {' | '.join(scores)} | {difference} | {shares[0]} [{shares[1]}, {shares[2]}] |")
    n, seeds = next((row["n"], row["training_seeds"]) for row in against_base.values())
    how = f"{n} prompts that were never trained on, {config.evaluate.samplers[sampler].description}"
    text = f"## Results\n\n{how}, 95% intervals over prompts; training seeds: {seeds}.\n\n" + "\n".join(lines)
    if (evaluated / SAMPLES).is_file():
        text += f"\n\n![samples]({SAMPLES})\n\nAll images of a column have the same prompt and seed."
    return [text]


def _training(config: Config, method: str) -> list[str]:
    section = config.align[method]
    settings: dict[str, Section] = {"sampling": config.sampling, method: section}
    for name in section.scorers:
        settings[f"preference model {name}"] = config.preference_models[name]
    plain: dict[str, Any] = {"seed": config.seed}
    plain |= {key: value.model_dump(mode="json", exclude_unset=True) for key, value in settings.items()}
    plain[method] = {"method": section.method, **plain[method]}
    pairs = config.prepare.preferences
    data = [f"- Prompts: `{config.prepare.prompts.source}`", *([f"- Pairs: `{pairs.source}`"] if pairs else [])]
    return ["## Training\n\n" + "\n".join(data) + f"\n\n```yaml\n{yaml.safe_dump(plain, sort_keys=False)}```"]


def _use(config: Config) -> str:
    pipeline = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}
    name, sampler = f"{pipeline[config.model.family]}Pipeline", config.evaluate.samplers[config.evaluate.deciding]
    height, width = config.model.size
    return f"""## Use

```python
from diffusers import {name}

pipeline = {name}.from_pretrained("{config.model.path}")
pipeline.load_lora_weights(".")  # this folder, or this repository's name
image = pipeline(
    "PROMPT",
    height={height},
    width={width},
    num_inference_steps={sampler.steps},
    guidance_scale={sampler.guidance_scale:g},
).images[0]
```

The licence of the base model holds for what is made with it."""


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
