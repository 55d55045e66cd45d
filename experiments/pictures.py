"""Pictures of the embedded world for experiments, with the parts of an opinion of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo.config import ModelConfig, SamplerConfig, SamplingConfig
from spo.data.images import decode_image
from spo.data.preferences import PreferencePairs
from spo.models.generate import eight_bits, generate, image_seed
from spo.models.load import build
from spo.runtime.files import atomic_path
from spo.workspace import Prepared
from spo.world.opinion import ALIGNED_AND_CENTRED, combine
from spo.world.oracle import oracle_scores
from spo.world.pretraining.pairs import sample_pool, to_jpeg
from spo.world.pretraining.parts import generator
from spo.world.pretraining.recipe import RECIPE

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Pictures:
    """Pictures, and the scores that make an opinion of them."""

    pixels: Tensor  # (n, 3, side, side) of 8 bits
    prompts: list[str]  # n
    finish: Tensor  # (n,)
    alignment: Tensor  # (n,)
    layout: Tensor  # (n,)
    images: list[bytes]  # n, as they are stored; none where they come from no file

    def utility(self, share: float) -> Tensor:
        content = {"alignment": self.alignment, "layout": self.layout}
        return combine(self.finish, content, ALIGNED_AND_CENTRED, share=share)


def scored(pixels: Tensor, prompts: Sequence[str], images: Sequence[bytes] = ()) -> Pictures:
    """8-bit pictures (n, 3, side, side) of n prompts, with the oracle's scores."""
    seen = oracle_scores(pixels / 255, prompts)
    finish = seen["vivid"] + seen["crisp"] + seen["clean"]
    return Pictures(pixels, list(prompts), finish, seen["alignment"], seen["centred"], list(images))


def prepared_pictures(prepared: Prepared) -> Pictures:
    """The pictures of the prepared training and validation pairs; they have one size in the embedded world."""
    known: dict[tuple[str, bytes], None] = {}
    for split in SPLITS:
        stored = PreferencePairs(prepared.pairs_file(split))
        for i in range(len(stored)):
            pair = stored[i]
            known |= {(pair.caption, pair.image_0): None, (pair.caption, pair.image_1): None}
    prompts, images = [prompt for prompt, _ in known], [image for _, image in known]
    pixels = torch.from_numpy(np.stack([np.array(decode_image(image)) for image in images])).permute(0, 3, 1, 2)
    return scored(pixels, prompts, images)


def lessons(base: Path, prompts: Sequence[str], file: Path, *, per_prompt: int) -> Pictures:
    """Pictures of the prompts by the base, with sampler settings as varied as those of the shipped pairs; made once.

    `python -m spo pretrain` uses such pictures beside the pairs, but from checkpoints of the base.
    """
    if not file.exists():
        random = generator(7)
        rows, pictures = sample_pool(base, prompts, per_prompt=per_prompt, chunk=RECIPE.chunk, generator=random)
        _keep(file, pictures, rows)
    return scored(*_kept(file, prompts))


def like_pictures(base: Path, prompts: Sequence[str], file: Path, *, per_prompt: int, steps: int) -> Pictures:
    """Pictures of the prompts by one model with one sampler, which differ only by chance; made once."""
    if not file.exists():
        model = build(ModelConfig(family="sd15", path=str(base), resolution=64), SamplingConfig(), "cpu")
        rows = torch.arange(len(prompts)).repeat_interleave(per_prompt)
        wanted = [prompts[i] for i in rows.tolist()]
        pictures = generate(
            model,
            wanted,
            [image_seed(2, prompt, i % per_prompt) for i, prompt in enumerate(wanted)],
            sampler=SamplerConfig(steps=steps, guidance_scale=3.0, eta=1.0),
            batch_size=RECIPE.chunk,
            label="pictures of the base",
        )
        _keep(file, eight_bits(pictures), rows)
    pixels, names = _kept(file, prompts)
    return scored(pixels, names, [to_jpeg(picture / 255) for picture in pixels])


def _keep(file: Path, pictures: Tensor, rows: Tensor) -> None:
    with atomic_path(file) as temporary:
        save_file({"pictures": (pictures * 255).round().byte(), "prompt": rows}, temporary)


def _kept(file: Path, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
    stored = load_file(file)
    return stored["pictures"], [prompts[i] for i in stored["prompt"].tolist()]
