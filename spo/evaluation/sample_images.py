"""Images of one prompt: by one model, or by the base and others side by side."""

import re
import sys
from collections.abc import Sequence
from functools import cached_property
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

MOST = 10_000  # pictures of one command


def choose_sampler(
    config: Config, name: str | None, *, steps: int | None, guidance: float | None, eta: float | None
) -> tuple[str, SamplerConfig]:
    """Name and settings of a sampler of the evaluation (None: the first), with the given settings instead of its own.

    ConfigError if there is no such sampler, or a setting is wrong.
    """
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
    return name, settings


class Painter:
    """Makes `num` pictures of a prompt, from `seed` on, with any model, and writes them as PNG files to `out`."""

    def __init__(
        self,
        config: Config,
        prompt: str,
        *,
        seed: int,
        num: int,
        out: Path,
        sampler: tuple[str, SamplerConfig],
        root: Path = Path(),
    ):
        if not prompt.strip():
            raise ConfigError("the prompt is empty; say what the picture should show")
        if num < 1:
            raise ConfigError(f"--num {num} makes no picture; use 1 or more")
        if num > MOST:
            raise ConfigError(f"--num {num} is too many; use at most {MOST}, and --seed for the next ones")
        if not 0 <= seed <= 2**63 - num:
            raise ConfigError(f"--seed {seed} is out of range; use a whole number from 0 to 2^63 - 1")
        self.config = config
        self.prompt = prompt
        self.seeds = list(range(seed, seed + num))
        self.out = out
        self.settings = sampler[1]
        self.root = root
        self._facts = {
            "prompt": prompt,
            "sampler": sampler[0],
            "scheduler": self.settings.scheduler,
            "steps": self.settings.steps,
            "guidance": self.settings.guidance_scale,
            **({} if self.settings.eta is None else {"eta": self.settings.eta}),
            **self.settings.options,
            "base": config.model.path,
            "commit": git_commit(root),
        }

    def paint(self, model: str | None) -> list[Path]:
        """Write one model's pictures to the folder `out`, or a single one to the file `out`; return their paths."""
        single = self.out.suffix.lower() == ".png"
        if single and len(self.seeds) > 1:
            raise ConfigError(f"--out {self.out} is one file, but --num asks for {len(self.seeds)}; name a folder")
        if not single:
            _require_folder(self.out)
        source = resolve_model(model, self.config, self.root)
        print(f"model: {source.description}", flush=True)
        paths = [self.out] if single else self._paths(source.name)
        self._write(source, paths)
        return paths

    def compare(self, models: Sequence[str]) -> Path:
        """Write pictures of base and models with the same seeds, and a sheet of all; return the sheet's path."""
        _require_folder(self.out)
        names = [BASE, *models] if models else [BASE, None]
        found = [resolve_model(name, self.config, self.root) for name in names]
        sources = list({source.lora: source for source in found}.values())
        if len(sources) < 2:
            raise ConfigError(
                f"there is nothing to compare: {sources[-1].description}; train one, or name one with --model"
            )
        columns: dict[str, list[Image.Image]] = {}
        for source in sources:  # the base is first, since the network keeps a source's LoRA
            name = source.name if source.name not in columns else f"{source.name} {len(columns)}"
            print(f"{name}: {source.description}", flush=True)
            columns[name] = self._write(source, self._paths(name))
        path = self.out / f"{_slug(self.prompt)}-{self.seeds[0]}-side-by-side.png"
        sheet = labelled_sheet(self.prompt, columns, [f"seed {seed}" for seed in self.seeds])
        models_shown = ", ".join(source.description for source in sources)
        save_png(sheet, path, {**self._facts, "models": models_shown, "seed": ", ".join(map(str, self.seeds))})
        return path

    @cached_property
    def _network(self) -> LatentDiffusion:
        return build(self.config.model, self.config.sampling, best_device())

    def _write(self, source: Source, paths: Sequence[Path]) -> list[Image.Image]:
        if source.lora is not None:
            load_policy(self._network.network, source.lora)
        images = generate(
            self._network,
            [self.prompt] * len(self.seeds),
            self.seeds,
            sampler=self.settings,
            batch_size=self.config.evaluate.batch_size,
            label=source.name,
        )
        pictures = [to_picture(image) for image in images]
        for picture, path, seed in zip(pictures, paths, self.seeds, strict=True):
            save_png(picture, path, {**self._facts, "model": source.description, "seed": seed})
        return pictures

    def _paths(self, name: str) -> list[Path]:
        return [self.out / f"{_slug(self.prompt)}-{_slug(name)}-{seed}.png" for seed in self.seeds]


def _require_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")


def _slug(text: str, limit: int = 48) -> str:
    encoding = sys.getfilesystemencoding()
    text = text.encode(encoding, "ignore").decode(encoding)  # what this locale can name
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:limit].rstrip("-") or "picture"
