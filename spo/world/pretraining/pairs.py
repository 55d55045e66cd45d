"""The embedded default's preference pairs: two generated pictures of a prompt, and one generic opinion of them.

Pictures come from the base at varied guidance, steps and eta, so that a pair differs in content, layout and finish, as
Pick-a-Pic's do. Each picture of a prompt is compared with the next one.
"""

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Generator, Tensor

from spo.config import ModelConfig, SamplerConfig, SamplingConfig
from spo.models.generate import eight_bits, generate, image_seed
from spo.models.load import build
from spo.runtime.files import atomic_path
from spo.runtime.pictures import to_picture
from spo.world.opinion import Opinion
from spo.world.oracle import FACTORS

QUALITY = 92  # of the JPEG files, without chroma subsampling
LEAST_VISIBLE = 0.6  # the oracle's visibility of an object that people would recognise


def sample_pool(
    base: Path, prompts: Sequence[str], *, per_prompt: int, chunk: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """`per_prompt` pictures of each prompt by a base: prompt indices (n,) and 8-bit pictures (n, 3, 64, 64) in [0, 1].

    Each chunk has a random guidance in [1.5, 7.5], 8 to 20 steps, and eta 0 or 1.
    """
    model = ModelConfig(family="sd15", path=str(base), resolution=64)
    index, pictures = [], []
    for number in range(per_prompt):
        for rows in torch.randperm(len(prompts), generator=generator).split(chunk):
            u = torch.rand(3, generator=generator).tolist()
            sampler = SamplerConfig(guidance_scale=1.5 + 6 * u[0], steps=8 + int(13 * u[1]), eta=float(u[2] < 0.5))
            names, label = [prompts[i] for i in rows.tolist()], f"pictures {number + 1}/{per_prompt}"
            index.append(rows)
            pictures.append(paint(model, names, sampler, seed=0, number=number, batch_size=chunk, label=label))
    return torch.cat(index), torch.cat(pictures)


def paint(
    config: ModelConfig,
    prompts: list[str],
    sampler: SamplerConfig,
    *,
    seed: int,
    number: int,
    batch_size: int,
    label: str,
) -> Tensor:
    """8-bit pictures (n, 3, 64, 64) in [0, 1] of n prompts, each the prompt's picture with this number."""
    model = build(config, SamplingConfig(), "cpu")
    seeds = [image_seed(seed, prompt, number) for prompt in prompts]
    return eight_bits(generate(model, prompts, seeds, sampler=sampler, batch_size=batch_size, label=label))


@dataclass(frozen=True)
class Pool:
    """All pictures, and which of them are compared with what result."""

    pictures: Tensor  # (n, 3, 64, 64) in [0, 1]
    prompts: list[str]  # n
    first: Tensor  # (m,) int: index of a pair's picture 0
    second: Tensor  # (m,) int
    label: Tensor  # (m,) of the first: 1, 0 or .5

    def of(self, prompts: Collection[str]) -> "Pool":
        """The pictures of some prompts, and their pairs."""
        own = torch.tensor([prompt in prompts for prompt in self.prompts])
        place = own.cumsum(0) - 1
        kept = own[self.first]
        names = [prompt for prompt in self.prompts if prompt in prompts]
        return Pool(self.pictures[own], names, place[self.first[kept]], place[self.second[kept]], self.label[kept])


def compare(
    pictures: Tensor, prompt_index: Tensor, prompts: Sequence[str], opinion: Opinion, generator: Generator
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
    utility = opinion.utility(pictures, names)
    return Pool(pictures, names, one, other, opinion.label(utility[one], utility[other], generator))


def recognisable(scores: Mapping[str, Tensor]) -> Tensor:
    """Which pictures (n,) show an object that the oracle can see, by its scores."""
    whole = torch.stack([scores[name] for name in FACTORS]).mean(dim=0)
    return scores["aesthetic"] > LEAST_VISIBLE * whole


def compare_all(
    pictures: Tensor, prompt_index: Tensor, prompts: Sequence[str], opinion: Opinion, generator: Generator
) -> Pool:
    """Pair each picture with every other one of its prompt, and label the pairs."""
    order = torch.argsort(prompt_index, stable=True)
    pictures, names = pictures[order], [prompts[i] for i in prompt_index[order].tolist()]
    counts = prompt_index.bincount(minlength=len(prompts))
    starts = counts.cumsum(0) - counts
    both = torch.cat(
        [start + torch.triu_indices(count, count, 1) for start, count in zip(starts, counts.tolist(), strict=True)],
        dim=1,
    )
    first, second = torch.where(torch.rand(both.shape[1], generator=generator) < 0.5, both, both.flip(0))
    utility = opinion.utility(pictures, names)
    return Pool(pictures, names, first, second, opinion.label(utility[first], utility[second], generator))


def to_jpeg(picture: Tensor) -> bytes:
    """JPEG bytes of (3, h, w) in [0, 1]."""
    buffer = io.BytesIO()
    to_picture(picture).save(buffer, format="JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def write_comparisons(pool: Pool, file: Path) -> None:
    """Write parquet with a row for each prompt: its pictures, once, and all comparisons of two of them."""
    rows: dict[str, dict[str, Any]] = {}
    place: list[int] = []  # of each picture among its prompt's
    for picture, prompt in zip(pool.pictures, pool.prompts, strict=True):
        row = rows.setdefault(prompt, {"caption": prompt, "images": [], "comparisons": []})
        place.append(len(row["images"]))
        row["images"].append(to_jpeg(picture))
    for i, j, label in zip(pool.first.tolist(), pool.second.tolist(), pool.label.tolist(), strict=True):
        rows[pool.prompts[i]]["comparisons"].append([place[i], place[j], label])
    with atomic_path(file) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows.values())), temporary, compression="zstd", row_group_size=64)


def write_pairs(pool: Pool, file: Path, generator: Generator) -> None:
    """Write parquet in Pick-a-Pic's layout, in random order."""
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
