"""The embedded default's preference pairs: two generated pictures of a prompt, and one generic opinion of them.

Pictures come from the base and its earlier checkpoints at varied guidance, steps and eta, so that a pair differs in
what it shows, where, and how well, as Pick-a-Pic's do. Each picture of a prompt is compared with the next one.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Generator, Tensor

from spo.config import ModelConfig, SamplerConfig, SamplingConfig
from spo.models.generate import eight_bits, generate, image_seed
from spo.models.load import build
from spo.runtime.files import atomic_path
from spo.world.opinion import label, utility

QUALITY = 92  # of the JPEG files, without chroma subsampling


@dataclass(frozen=True)
class Setting:
    """One way of sampling."""

    checkpoint: Path
    sampler: SamplerConfig


def draw_setting(checkpoints: Sequence[Path], generator: Generator) -> Setting:
    """A random checkpoint, guidance in [1.5, 7.5], 8 to 20 steps, eta 0 or 1."""
    u = torch.rand(4, generator=generator).tolist()
    return Setting(
        checkpoint=checkpoints[int(u[0] * len(checkpoints))],
        sampler=SamplerConfig(guidance_scale=1.5 + 6 * u[1], steps=8 + int(13 * u[2]), eta=float(u[3] < 0.5)),
    )


def sample_pool(
    checkpoints: Sequence[Path], prompts: Sequence[str], *, per_prompt: int, chunk: int, generator: Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """`per_prompt` pictures of each prompt: yields prompt indices (m,) and 8-bit pictures (m, 3, 64, 64) by chunks."""
    for round_ in range(per_prompt):
        for rows in torch.randperm(len(prompts), generator=generator).split(chunk):
            setting = draw_setting(checkpoints, generator)
            model = build(
                ModelConfig(family="sd15", path=str(setting.checkpoint), resolution=64), SamplingConfig(), "cpu"
            )
            wanted = [prompts[i] for i in rows.tolist()]
            pictures = generate(
                model,
                wanted,
                [image_seed(0, prompt, round_) for prompt in wanted],
                sampler=setting.sampler,
                batch_size=chunk,
                label=f"pictures {round_ + 1}/{per_prompt}",
            )
            yield rows, eight_bits(pictures)


@dataclass(frozen=True)
class Pool:
    """All pictures, and which of them are compared with what result."""

    pictures: Tensor  # (n, 3, 64, 64) in [0, 1]
    prompts: list[str]  # n
    first: Tensor  # (m,) int: index of a pair's picture 0
    second: Tensor  # (m,) int
    label: Tensor  # (m,) of the first: 1, 0 or .5


def compare(
    pictures: Tensor,
    prompt_index: Tensor,
    prompts: Sequence[str],
    *,
    share: float,
    temperature: float,
    tie: float,
    generator: Generator,
) -> Pool:
    """Pair each picture with the next one of its prompt, in a ring, and label the pairs."""
    names = [prompts[i] for i in prompt_index.tolist()]
    first, second = [], []
    for i in range(len(prompts)):
        own = (prompt_index == i).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=generator)]
        first.append(own)
        second.append(own.roll(-1))
    one, other = torch.cat(first), torch.cat(second)
    opinion = utility(pictures, names, share=share)
    labels = label(opinion[one], opinion[other], temperature=temperature, tie=tie, generator=generator)
    return Pool(pictures, names, one, other, labels)


def to_jpeg(picture: Tensor) -> bytes:
    """JPEG bytes of (3, h, w) in [0, 1]."""
    buffer = io.BytesIO()
    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
    image.save(buffer, format="JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def write_pairs(pool: Pool, file: Path, generator: Generator) -> None:
    """Parquet in Pick-a-Pic's layout, in random order; a picture that stands in two pairs is stored once a column."""
    files = [to_jpeg(picture) for picture in pool.pictures]
    order = torch.randperm(len(pool.label), generator=generator).tolist()
    first, second, label_0 = pool.first.tolist(), pool.second.tolist(), pool.label.tolist()
    table = pa.table(
        {
            "caption": [pool.prompts[first[i]] for i in order],
            "jpg_0": pa.array([files[first[i]] for i in order], pa.binary()),
            "jpg_1": pa.array([files[second[i]] for i in order], pa.binary()),
            "label_0": [label_0[i] for i in order],
            "label_1": [1 - label_0[i] for i in order],
        }
    )
    with atomic_path(file) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=256)
