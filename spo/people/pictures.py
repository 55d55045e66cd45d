"""Pairs to label: two pictures by one model from two seeds, or the pairs of existing preference files."""

import io
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spo.config import Config, SamplerConfig
from spo.data.images import decode_image
from spo.data.preferences import PreferencePair, read_preferences
from spo.data.prompts import read_prompts, split_of
from spo.data.rows import Rejected
from spo.errors import ModelError
from spo.evaluation.resolve_model import Source
from spo.evaluation.result_cache import digest_of_model
from spo.models.generate import generate, image_seed
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build
from spo.models.policy import load_policy
from spo.people.pairs import Pair
from spo.runtime.device import best_device
from spo.runtime.files import atomic_path
from spo.runtime.hashing import json_hash, short_hash
from spo.runtime.pictures import save_png, to_picture

AT_ONCE = 4  # pairs that are made together, so that the first ones are ready soon
SHOWN = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # formats that browsers show and that keep their bytes


def prompts_to_label(config: Config, root: Path = Path()) -> list[str]:
    """The training prompts with the validation prompts spread evenly among them, as `prepare` splits them.

    A few choices thus give pairs for both sides. Test prompts are left out.
    """
    source = config.prepare.prompts
    prompts, _ = read_prompts(root / source.source, field=source.field, max_prompts=source.max_prompts)
    split = split_of(prompts, config)
    sides = (split.train, split.validation)
    places = [((i + 0.5) / len(side), prompt) for side in sides for i, prompt in enumerate(side)]
    return [prompt for _, prompt in sorted(places)]


class Pictures:
    """Pairs of pictures by one model. They are kept in `folder`, so a second run does not make them again.

    Each picture has its own seed, which depends on `seed`, its prompt and its number alone.
    """

    def __init__(
        self, config: Config, source: Source, sampler: SamplerConfig, *, seed: int, folder: Path, root: Path = Path()
    ):
        self.config = config
        self.source = source
        self.sampler = sampler
        self.seed = seed
        self.folder = folder
        self._prompts = prompts_to_label(config, root)
        weights = [digest_of_model(str(path)) for path in (config.model.path, config.model.vae, source.lora) if path]
        self._context = [config.model.model_dump(mode="json"), weights, sampler.model_dump(mode="json")]

    def pairs(self, num: int) -> Iterator[Pair]:
        """`num` pairs, one a prompt; when the prompts end, they come again with other seeds."""
        for start in range(0, num, AT_ONCE):
            batch = [self._pair(i) for i in range(start, min(start + AT_ONCE, num))]
            if missing := [pair for pair in batch if not all(path.exists() for path in pair.pictures)]:
                self._make(missing)
            yield from batch

    def _pair(self, index: int) -> Pair:
        prompt, turn = self._prompts[index % len(self._prompts)], index // len(self._prompts)
        seeds = [image_seed(self.seed, prompt, 2 * turn + i) for i in (0, 1)]
        name = json_hash([*self._context, prompt, seeds])
        first, second = (self.folder / f"{name}-{i}.png" for i in (0, 1))
        facts = {"model": self.source.description, "seed_0": seeds[0], "seed_1": seeds[1]}
        return Pair(name, prompt, (first, second), facts)

    @cached_property
    def _model(self) -> LatentDiffusion:
        torch.set_flush_denormal(True)  # it belongs to the thread
        model = build(self.config.model, self.config.sampling, best_device())
        if self.source.lora is not None:
            load_policy(model.network, self.source.lora)
        return model

    def _make(self, pairs: Sequence[Pair]) -> None:
        images = generate(
            self._model,
            [pair.prompt for pair in pairs for _ in pair.pictures],
            [_int(pair.facts[f"seed_{i}"]) for pair in pairs for i in (0, 1)],
            sampler=self.sampler,
            batch_size=min(2 * AT_ONCE, self.config.evaluate.batch_size),
        )
        if not torch.isfinite(images).all():
            raise ModelError(f"{self.source.description} makes pictures that are not finite; check the model")
        for image, path in zip(images, [path for pair in pairs for path in pair.pictures], strict=True):
            save_png(to_picture(image), path, {})


def existing_pairs(source: str, folder: Path, *, num: int | None, root: Path = Path()) -> Iterator[Pair]:
    """The usable pairs of a preference source, without their labels; equal pairs come once."""
    seen: set[str] = set()
    for item in read_preferences(source, root=root):
        if isinstance(item, Rejected):
            continue
        name = short_hash(b"\0".join([item.caption.encode(), item.image_0, item.image_1]))
        if name in seen:
            continue
        seen.add(name)
        yield Pair(name, item.caption, _written(item, name, folder), {"source": source})
        if len(seen) == (math.inf if num is None else num):
            break


def _written(pair: PreferencePair, name: str, folder: Path) -> tuple[Path, Path]:
    first, second = (_write_image(data, folder / f"{name}-{i}") for i, data in enumerate((pair.image_0, pair.image_1)))
    return first, second


def _write_image(data: bytes, stem: Path) -> Path:
    """A file that a browser shows: the bytes as they are, or as a PNG where browsers do not read the format."""
    with Image.open(io.BytesIO(data)) as image:
        suffix = SHOWN.get(str(image.format))
    path = stem.with_suffix(suffix or ".png")
    if not path.exists():
        with atomic_path(path) as temporary:
            if suffix:
                temporary.write_bytes(data)
            else:
                decode_image(data).save(temporary)
    return path


def _int(value: Any) -> int:
    return int(value)
