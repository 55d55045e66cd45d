"""Images of one prompt: by one model, or by the base and others side by side."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pydantic import ValidationError

from spo.config import Config, SamplerConfig
from spo.errors import ConfigError
from spo.evaluation.resolve_model import BASE, Source, resolve_model
from spo.models.generate import generate
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build
from spo.models.policy import load_policy
from spo.models.schedulers import build_scheduler
from spo.runtime.device import best_device
from spo.runtime.environment import git_commit
from spo.runtime.pictures import labelled_sheet, save_png, to_picture


@dataclass(frozen=True)
class Sampler:
    """A sampler of the profile's evaluation, perhaps with other settings."""

    name: str
    settings: SamplerConfig

    @classmethod
    def of(
        cls, config: Config, name: str | None, *, steps: int | None, guidance: float | None, eta: float | None
    ) -> "Sampler":
        """The sampler called `name` (None: the first), with the given settings; ConfigError if they are wrong."""
        samplers = config.evaluate.samplers
        name = config.evaluate.deciding if name is None else name
        if name not in samplers:
            raise ConfigError(f"--sampler {name!r} is not in evaluate.samplers; use one of {list(samplers)}")
        given = {"steps": steps, "guidance_scale": guidance, "eta": eta}
        given = {key: value for key, value in given.items() if value is not None}
        try:
            settings = SamplerConfig.model_validate(samplers[name].model_dump() | given)
        except ValidationError:
            raise ConfigError(
                f"steps={steps}, guidance={guidance}, eta={eta}: "
                "steps must be at least 1, guidance at least 1, eta from 0 to 1"
            ) from None
        build_scheduler(settings)
        return cls(name, settings)


def show_one(
    config: Config, prompt: str, *, model: str | None, seed: int, num: int, out: Path, sampler: Sampler, root: Path
) -> list[Path]:
    """Write `num` PNGs, from `seed` on, to the folder `out`, or one to the file `out`; return their paths."""
    seeds = _seeds(prompt, seed, num)
    single = out.suffix.lower() == ".png"
    if single and num > 1:
        raise ConfigError(f"--out {out} is one file, but --num asks for {num}; name a folder")
    if not single:
        _folder(out)
    source = resolve_model(model, config, root)
    print(f"model: {source.description}", flush=True)
    network = build(config.model, config.sampling, best_device())
    pictures = _pictures(config, network, source, prompt, seeds, sampler)
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
    """Write PNGs of base and models with the same seeds, and a sheet of all; return the sheet's path."""
    seeds = _seeds(prompt, seed, num)
    _folder(out)
    wanted: Sequence[str | None] = models or [None]
    sources = [resolve_model(BASE, config, root), *(resolve_model(name, config, root) for name in wanted)]
    sources = list({source.lora: source for source in sources}.values())
    if len(sources) < 2:
        raise ConfigError(
            f"there is nothing to compare: {sources[-1].description}; train one, or name one with --model"
        )
    network = build(config.model, config.sampling, best_device())
    columns: dict[str, list[Image.Image]] = {}
    for source in sources:
        name = source.name if source.name not in columns else f"{source.name} {len(columns)}"
        print(f"{name}: {source.description}", flush=True)
        columns[name] = _pictures(config, network, source, prompt, seeds, sampler)
        paths = [out / _name(prompt, source, each, label=name) for each in seeds]
        _save(columns[name], paths, config, source, prompt, seeds, sampler, root)
    path = out / f"{_slug(prompt)}-{seed}-side-by-side.png"
    sheet = labelled_sheet(prompt, columns, [f"seed {each}" for each in seeds])
    facts = {**_facts(config, sampler, prompt, root), "models": ", ".join(source.description for source in sources)}
    save_png(sheet, path, {**facts, "seed": ", ".join(map(str, seeds))})
    return path


def _folder(out: Path) -> None:
    """ConfigError if `out` is no folder."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")


def _pictures(
    config: Config, network: LatentDiffusion, source: Source, prompt: str, seeds: Sequence[int], sampler: Sampler
) -> list[Image.Image]:
    """One picture for each seed. The network keeps the source's LoRA, so the base must come first."""
    if source.lora is not None:
        load_policy(network.network, source.lora)
    images = generate(
        network,
        [prompt] * len(seeds),
        seeds,
        sampler=sampler.settings,
        batch_size=config.evaluate.batch_size,
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
        save_png(picture, path, {**facts, "model": source.description, "seed": seed})


def _facts(config: Config, sampler: Sampler, prompt: str, root: Path) -> dict[str, object]:
    settings = sampler.settings
    return {
        "prompt": prompt,
        "sampler": sampler.name,
        "scheduler": settings.scheduler,
        "steps": settings.steps,
        "guidance": settings.guidance_scale,
        **({} if settings.eta is None else {"eta": settings.eta}),
        **settings.options,
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
