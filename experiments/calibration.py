"""Compare the labels of shipped preference pairs of the drawn world with those of Pick-a-Pic.

    python -m experiments.calibration [data/preferences/tiny-people] [data/preferences/tiny]

Prints a table: the share of decided pairs whose preferred picture has the higher score, and the share of ties.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bench.markdown import table
from bench.measure import mistakes_in_one_line
from spo.data.images import decode_image
from spo.data.preferences import PreferencePair, read_preferences
from spo.errors import SpoError
from spo.runtime.libraries import set_up_libraries
from spo.world.opinion import Opinion
from spo.world.pretraining.calibration import PUBLISHED, RANGES, agreement
from spo.world.pretraining.pairs import Pool
from spo.world.pretraining.recipe import RECIPE

OPINIONS: dict[str, Opinion] = {"tiny-people": RECIPE.people, "tiny": RECIPE.opinion}  # by the folder's name
ABOUT = {
    "aesthetic": "aesthetic score (LAION's predictor)",
    "alignment": "alignment score (CLIP-H)",
    "opinion": "the opinion without noise (PickScore)",
    "finish": "finish alone",
    "ties": "ties",
}


def read_pool(source: Path) -> Pool:
    """The pictures and pairs of a source; a picture of several pairs is held once."""
    pictures: dict[tuple[str, bytes], int] = {}
    rows: list[tuple[int, int, float]] = []
    for pair in read_preferences(str(source)):
        if not isinstance(pair, PreferencePair):
            raise SpoError(f"{source}: row {pair.row}: {pair.reason}")
        both = [pictures.setdefault((pair.caption, image), len(pictures)) for image in (pair.image_0, pair.image_1)]
        rows.append((both[0], both[1], pair.label_0))
    pixels = np.stack([np.asarray(decode_image(image)) for _, image in pictures])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    first, second, label = zip(*rows, strict=True)
    prompts = [prompt for prompt, _ in pictures]
    return Pool(images, prompts, torch.tensor(first), torch.tensor(second), torch.tensor(label))


@mistakes_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.calibration", description=__doc__.splitlines()[0])
    shipped = [Path("data/preferences") / name for name in OPINIONS]
    parser.add_argument("sources", nargs="*", type=Path, default=shipped, help="folders of shipped pairs")
    options = parser.parse_args(arguments)
    set_up_libraries()
    if unknown := [str(source) for source in options.sources if source.name not in OPINIONS]:
        raise SpoError(f"{unknown} are no shipped pairs; use {[str(path) for path in shipped]}")
    pools = {source.name: read_pool(source) for source in options.sources}
    found = {name: agreement(pool, OPINIONS[name]) for name, pool in pools.items()}
    head = ["share of decided pairs that agree", "Pick-a-Pic", "range", *found]
    rows = [
        [
            about,
            f"{PUBLISHED[name]:.3f}" if name in PUBLISHED else "",
            "{:.2f} to {:.2f}".format(*RANGES[name]) if name in RANGES else "",
            *(f"{shares[name]:.3f}" for shares in found.values()),
        ]
        for name, about in ABOUT.items()
    ]
    counted = [f"{len(pool.label):,} of {len(pool.pictures):,} pictures" for pool in pools.values()]
    print(table([head, *rows, ["pairs", "", "", *counted]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
