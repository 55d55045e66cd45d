"""Pictures of one prompt for the user's eyes: of one model, or of the base and others side by side."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from spo.config import Config
from spo.errors import ConfigError
from spo.evaluation.resolve_model import BASE, Source, resolve_model
from spo.models.generate import generate
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build
from spo.models.policy import load_policy
from spo.runtime.device import best_device
from spo.runtime.environment import git_commit
from spo.runtime.pictures import labelled_sheet, save_png, to_picture


@dataclass(frozen=True)
class Sampler:
    """How the pictures are sampled."""

    steps: int
    guidance_scale: float
    eta: float
    batch_size: int

    @classmethod
    def of(cls, config: Config, *, steps: int | None, guidance: float | None, eta: float | None) -> "Sampler":
        """The evaluation's deciding sampler, with what is given instead; ConfigError for values out of range."""
        given = config.evaluate
        sampler = cls(
            given.steps if steps is None else steps,
            given.guidance_scale if guidance is None else guidance,
            given.etas[0] if eta is None else eta,
            given.batch_size,
        )
        if sampler.steps < 1 or sampler.guidance_scale < 1 or not 0 <= sampler.eta <= 1:
            raise ConfigError(
                f"steps={sampler.steps}, guidance={sampler.guidance_scale:g}, eta={sampler.eta:g}: "
                "steps must be at least 1, guidance at least 1, eta from 0 to 1"
            )
        return sampler


def show_one(
    config: Config, prompt: str, *, model: str | None, seed: int, num: int, out: Path, sampler: Sampler, root: Path
) -> list[Path]:
    """Write `num` PNGs of the seeds from `seed` on into the folder `out`, or one to the file `out`; their paths."""
    seeds = _seeds(prompt, seed, num)
    single = out.suffix.lower() == ".png"
    if single and num > 1:
        raise ConfigError(f"--out {out} is one file, but --num asks for {num}; name a folder")
    if not single:
        _folder(out)
    source = resolve_model(model, config, root)
    print(f"model: {source.told}", flush=True)
    network = build(config.model, config.sampling, best_device())
    pictures = _pictures(network, source, prompt, seeds, sampler)
    paths = [out] if single else [out / _name(prompt, source, each) for each in seeds]
    _save(pictures, paths, config, source, prompt, seeds, sampler, root)
    return paths


def show_side_by_side(
    config: Config,
    prompt: str,
    *,
    models: Sequence[str],
    seed: int,
    num: int,
    out: Path,
    sampler: Sampler,
    root: Path,
) -> Path:
    """Write base and models with the same seeds: a PNG each, and one sheet of all, whose path is returned."""
    seeds = _seeds(prompt, seed, num)
    _folder(out)
    wanted: Sequence[str | None] = models or [None]
    sources = [resolve_model(BASE, config, root), *(resolve_model(name, config, root) for name in wanted)]
    sources = list({source.lora: source for source in sources}.values())
    if len(sources) < 2:
        raise ConfigError(f"there is nothing to compare: {sources[-1].told}; train one, or name one with --model")
    network = build(config.model, config.sampling, best_device())
    columns: dict[str, list[Image.Image]] = {}
    for source in sources:
        name = source.name if source.name not in columns else f"{source.name} {len(columns)}"
        print(f"{name}: {source.told}", flush=True)
        columns[name] = _pictures(network, source, prompt, seeds, sampler)
        paths = [out / _name(prompt, source, each, label=name) for each in seeds]
        _save(columns[name], paths, config, source, prompt, seeds, sampler, root)
    path = out / f"{_slug(prompt)}-{seed}-side-by-side.png"
    sheet = labelled_sheet(prompt, columns, [f"seed {each}" for each in seeds])
    facts = {**_facts(config, sampler, prompt, root), "models": ", ".join(source.told for source in sources)}
    save_png(sheet, path, {**facts, "seed": ", ".join(map(str, seeds))})
    return path


def _folder(out: Path) -> None:
    """ConfigError where there is something else in the folder's place, before anything is painted."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")


def _pictures(
    network: LatentDiffusion, source: Source, prompt: str, seeds: Sequence[int], sampler: Sampler
) -> list[Image.Image]:
    """One picture a seed; the network holds the source's LoRA afterwards. The base comes before any LoRA."""
    if source.lora is not None:
        load_policy(network.network, source.lora)
    images = generate(
        network,
        [prompt] * len(seeds),
        seeds,
        steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        eta=sampler.eta,
        batch_size=sampler.batch_size,
        label=source.name,
    )
    return [to_picture(image) for image in images]


def _save(
    pictures: Sequence[Image.Image],
    paths: Sequence[Path],
    config: Config,
    source: Source,
    prompt: str,
    seeds: Sequence[int],
    sampler: Sampler,
    root: Path,
) -> None:
    facts = _facts(config, sampler, prompt, root)
    for picture, path, seed in zip(pictures, paths, seeds, strict=True):
        save_png(picture, path, {**facts, "model": source.told, "seed": seed})


def _facts(config: Config, sampler: Sampler, prompt: str, root: Path) -> dict[str, object]:
    return {
        "prompt": prompt,
        "steps": sampler.steps,
        "guidance": sampler.guidance_scale,
        "eta": sampler.eta,
        "base": config.model.path,
        "commit": git_commit(root),
    }


def _seeds(prompt: str, seed: int, num: int) -> list[int]:
    if not prompt.strip():
        raise ConfigError("the prompt is empty; say what the picture should show")
    if num < 1:
        raise ConfigError(f"--num {num} makes no picture; use 1 or more")
    if not 0 <= seed <= 2**63 - num:
        raise ConfigError(f"--seed {seed} is out of range; use a whole number from 0 to 2^63 - 1")
    return list(range(seed, seed + num))


def _name(prompt: str, source: Source, seed: int, *, label: str | None = None) -> str:
    return f"{_slug(prompt)}-{_slug(label or source.name)}-{seed}.png"


def _slug(text: str, limit: int = 48) -> str:
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:limit].rstrip("-") or "picture"
