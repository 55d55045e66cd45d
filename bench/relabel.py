"""The prepared preference pairs under another opinion: same pictures, same comparisons, new labels.

The opinion is the one that labels the embedded default's pairs (spo/pretrain/opinion.py), with another share of finish
in it or more noise. So the pictures must be of the drawn world.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from spo.data.images import decode_image
from spo.data.preferences import PairWriter, PreferencePair, PreferencePairs
from spo.evaluation.metrics import score
from spo.evaluation.oracle import judge
from spo.files import atomic_path
from spo.pretrain.opinion import combine, label
from spo.pretrain.preference import Opinion

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Pictures:
    """Different pictures, and what the opinion of them is made of."""

    pixels: Tensor  # (n, 3, side, side) of 8 bits
    prompts: list[str]  # n
    finish: Tensor  # (n,)
    alignment: Tensor  # (n,)
    layout: Tensor  # (n,)
    images: list[bytes]  # n, as they are stored; none where they come from no file

    def utility(self, share: float) -> Tensor:
        return combine(self.finish, self.alignment, self.layout, share=share)


def judged(pixels: Tensor, prompts: Sequence[str], images: Sequence[bytes] = ()) -> Pictures:
    """8-bit pictures (n, 3, side, side) of n prompts, with the oracle's judgement of them."""
    seen = score([judge], pixels / 255, prompts)
    finish = seen["vivid"] + seen["crisp"] + seen["clean"]
    return Pictures(pixels, list(prompts), finish, seen["alignment"], seen["centred"], list(images))


def read_pictures(prepared: Path) -> Pictures:
    """The pictures of the prepared training and validation pairs; of one size, being the drawn world's."""
    known: dict[tuple[str, bytes], None] = {}
    for split in SPLITS:
        stored = PreferencePairs(prepared / "preferences" / f"{split}.parquet")
        for i in range(len(stored)):
            pair = stored[i]
            known |= {(pair.caption, pair.image_0): None, (pair.caption, pair.image_1): None}
    prompts, images = [prompt for prompt, _ in known], [image for _, image in known]
    pixels = torch.from_numpy(np.stack([np.array(decode_image(image)) for image in images])).permute(0, 3, 1, 2)
    return judged(pixels, prompts, images)


def relabel(prepared: Path, target: Path, pictures: Pictures, opinion: Opinion, *, seed: int) -> dict[str, float]:
    """Write train.parquet and validation.parquet to `target`; returns how the new labels are made up.

    `ties`, and of the decided pairs `agrees_finish` and `agrees_content`: how often the preferred picture is also the
    better finished one, and the one that fits prompt and layout better.
    """
    utility = pictures.utility(opinion.share)
    content = pictures.utility(0.0)
    row = {key: i for i, key in enumerate(zip(pictures.prompts, pictures.images, strict=True))}
    ties, finish, fits = [], [], []
    with atomic_path(target) as folder:
        folder.mkdir(parents=True)
        for number, split in enumerate(SPLITS):
            stored = PreferencePairs(prepared / "preferences" / f"{split}.parquet")
            pairs = [stored[i] for i in range(len(stored))]
            one = torch.tensor([row[pair.caption, pair.image_0] for pair in pairs])
            other = torch.tensor([row[pair.caption, pair.image_1] for pair in pairs])
            labels = label(
                utility[one],
                utility[other],
                temperature=opinion.temperature,
                tie=opinion.tie,
                generator=Generator().manual_seed(1000 * seed + number),
            )
            write_labels(folder / f"{split}.parquet", pairs, labels)
            decided = labels != 0.5
            first = labels[decided] == 1
            ties.append(~decided)
            finish.append(first == (pictures.finish[one] > pictures.finish[other])[decided])
            fits.append(first == (content[one] > content[other])[decided])
    named = {"ties": ties, "agrees_finish": finish, "agrees_content": fits}
    return {name: torch.cat(parts).float().mean().item() for name, parts in named.items()}


def write_labels(file: Path, pairs: Sequence[PreferencePair], labels: Tensor) -> None:
    with PairWriter(file) as writer:
        for pair, first in zip(pairs, labels.tolist(), strict=True):
            writer.write(replace(pair, label_0=first, label_1=1 - first))
