"""Preference pairs under another opinion: pictures of the drawn world, compared and labelled anew.

The opinion is the one that labels the embedded default's pairs (spo/world/opinion.py), with another share of finish
in it or more noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from experiments.pictures import Pictures
from spo.data.preferences import PairWriter, PreferencePair, PreferencePairs
from spo.runtime.files import atomic_path
from spo.world.opinion import Opinion


@dataclass(frozen=True)
class Comparisons:
    """Which pictures are compared with which."""

    pictures: Pictures
    one: Tensor  # (m,) index
    other: Tensor  # (m,) index


def prepared_comparisons(file: Path, pictures: Pictures) -> Comparisons:
    """Those of a prepared file, whose pictures are among `pictures`."""
    row = {key: i for i, key in enumerate(zip(pictures.prompts, pictures.images, strict=True))}
    stored = PreferencePairs(file)
    pairs = [stored[i] for i in range(len(stored))]
    one = torch.tensor([row[pair.caption, pair.image_0] for pair in pairs])
    other = torch.tensor([row[pair.caption, pair.image_1] for pair in pairs])
    return Comparisons(pictures, one, other)


def rings(pictures: Pictures, generator: Generator) -> Comparisons:
    """Each picture with another one of its prompt, in a ring, as the shipped pairs were made; in random order."""
    members: dict[str, list[int]] = {}
    for i, prompt in enumerate(pictures.prompts):
        members.setdefault(prompt, []).append(i)
    one = torch.cat([torch.tensor(rows) for rows in members.values()])
    other = torch.cat([torch.tensor(rows).roll(-1) for rows in members.values()])
    order = torch.randperm(len(one), generator=generator)
    return Comparisons(pictures, one[order], other[order])


def write_pairs(splits: Mapping[str, Comparisons], target: Path, opinion: Opinion, *, seed: int) -> dict[str, float]:
    """Label the splits' comparisons and write <split>.parquet of each to `target`; how the labels are made up.

    `ties`, and of the decided pairs `agrees_finish` and `agrees_content`: how often the preferred picture is also the
    better finished one, and the one that fits prompt and layout better; all of the first split.
    """
    made: list[dict[str, float]] = []
    with atomic_path(target) as folder:
        folder.mkdir(parents=True)
        for number, (split, compared) in enumerate(splits.items()):
            pictures, one, other = compared.pictures, compared.one, compared.other
            utility, content = pictures.utility(opinion.share), pictures.utility(0.0)
            generator = Generator().manual_seed(1000 * seed + number)
            labels = opinion.label(utility[one], utility[other], generator)
            with PairWriter(folder / f"{split}.parquet") as writer:
                for i, j, first in zip(one.tolist(), other.tolist(), labels.tolist(), strict=True):
                    caption, images = pictures.prompts[i], (pictures.images[i], pictures.images[j])
                    writer.write(PreferencePair(caption, *images, first, 1 - first))
            decided = labels != 0.5
            first_wins = labels[decided] == 1
            made.append(
                {
                    "ties": 1 - decided.float().mean().item(),
                    "agrees_finish": _agreement(first_wins, (pictures.finish[one] > pictures.finish[other])[decided]),
                    "agrees_content": _agreement(first_wins, (content[one] > content[other])[decided]),
                }
            )
    return made[0]


def _agreement(one: Tensor, other: Tensor) -> float:
    return (one == other).float().mean().item()
