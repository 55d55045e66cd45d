"""Preference pairs with labels by another opinion, for pictures of the embedded world.

The opinion is the one that labels the embedded default's pairs (spo/world/opinion.py), with another share of finish
or more noise.
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
    """The comparisons of a prepared file, whose pictures are among `pictures`."""
    row = {key: i for i, key in enumerate(zip(pictures.prompts, pictures.images, strict=True))}
    stored = PreferencePairs(file)
    pairs = [stored[i] for i in range(len(stored))]
    one = torch.tensor([row[pair.caption, pair.image_0] for pair in pairs])
    other = torch.tensor([row[pair.caption, pair.image_1] for pair in pairs])
    return Comparisons(pictures, one, other)


def rings(pictures: Pictures, generator: Generator) -> Comparisons:
    """Compare each picture with the next one of its prompt, in a ring like the shipped pairs; in random order."""
    members: dict[str, list[int]] = {}
    for i, prompt in enumerate(pictures.prompts):
        members.setdefault(prompt, []).append(i)
    one = torch.cat([torch.tensor(rows) for rows in members.values()])
    other = torch.cat([torch.tensor(rows).roll(-1) for rows in members.values()])
    order = torch.randperm(len(one), generator=generator)
    return Comparisons(pictures, one[order], other[order])


def write_pairs(splits: Mapping[str, Comparisons], target: Path, opinion: Opinion, *, seed: int) -> dict[str, float]:
    """Label the comparisons, write them to <target>/<split>.parquet, and return measurements of the first split.

    `ties`: the share of ties; `agrees_finish` and `agrees_content`: the share of decided pairs whose preferred picture
    also has the better finish, or fits prompt and layout better.
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
