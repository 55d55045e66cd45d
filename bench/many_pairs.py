"""Memory of the stages that read preference pairs, against the number of pairs.

    python -m bench.many_pairs [--pairs 5000 50000 500000] [--out bench/results/many_pairs.csv]

The pairs are made: two pictures of 32 x 32 random pixels, no two alike, and captions of which eight pairs each share
one. The models are the embedded default's. `prepare` checks all pairs, `train_preference` encodes all and makes a few
steps on them, and Diffusion-DPO makes a few updates. Each stage is a process of its own. What it owns is its resident
memory without mapped files, whose pages the system may drop.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from bench.measure import RESULTS, at_least, mistakes_in_one_line
from spo.config import Config, load_config
from spo.data.preferences import PairWriter, PreferencePair
from spo.errors import SpoError
from spo.runtime.files import write_csv
from spo.runtime.libraries import set_up_libraries
from spo.runtime.progress import progress
from spo.stages import align, prepare, train_preference
from spo.tracking import NullTracker

SIDE = 32  # pixels of a picture
SHARED = 8  # pairs with one caption
STAGES = ("prepare", "train_preference", "align")
HOME = Path(__file__).parents[1]
PAUSE = 0.02  # seconds between two looks at a stage's memory


def profile(source: Path) -> Config:
    """The embedded default with these pairs, and hardly trained."""
    values = load_config(HOME, "tiny").model_dump()
    values["model"] |= {"path": str(HOME / values["model"]["path"]), "resolution": SIDE}
    values["prepare"]["prompts"] |= {"source": str(HOME / values["prepare"]["prompts"]["source"])}
    values["prepare"]["preferences"] |= {"source": str(source)}
    pixel = values["preference_models"]["pixel"]
    pixel |= {"start_from": str(HOME / pixel["start_from"]), "steps": 5, "candidates": None}
    pixel |= {"evaluate_pairs": 64, "evaluate_timesteps": (1,)}
    values["preference_models"] = {"pixel": pixel}
    dpo = values["align"]["diffusion_dpo"] | {"epochs": 1, "updates_per_epoch": 10, "checkpoints": 1, "watch": None}
    values |= {"align": {"diffusion_dpo": dpo}, "methods": ("diffusion_dpo",), "train_preference": ("pixel",)}
    return Config.model_validate(values)


def write_pairs(path: Path, count: int) -> None:
    """Write `count` pairs in Pick-a-Pic's layout."""
    draw = np.random.default_rng(0)

    def picture() -> bytes:
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file, "JPEG")
        return file.getvalue()

    with PairWriter(path) as writer:
        for number in progress(range(count), label="make pairs"):
            writer.write(PreferencePair(f"a thing with number {number // SHARED}", picture(), picture(), 1.0, 0.0))


def run_stage(stage: str, folder: Path) -> None:
    """Run a stage in `folder`."""
    set_up_libraries()
    config = profile(folder / "pairs.parquet")
    match stage:
        case "prepare":
            prepare.run(config, root=folder, tracker=NullTracker())
        case "train_preference":
            train_preference.run(config, "pixel", root=folder, tracker=NullTracker())
        case "align":
            align.run(config, "diffusion_dpo", 0, root=folder, tracker=NullTracker())


def watched(stage: str, folder: Path) -> dict[str, Any]:
    """The seconds of a stage, and the bytes that it owned at most."""
    start, owned = time.perf_counter(), 0
    command = [sys.executable, "-m", "bench.many_pairs", "--stage", stage, "--folder", str(folder)]
    process = psutil.Popen(command, cwd=HOME)
    while process.poll() is None:
        try:
            memory = process.memory_info()
            owned = max(owned, memory.rss - memory.shared)
        except psutil.Error:
            break
        time.sleep(PAUSE)
    if process.wait():
        raise SpoError(f"stage {stage} failed with exit code {process.returncode}; its message is above")
    return {"stage": stage, "owned_mb": round(owned / 1e6, 1), "seconds": round(time.perf_counter() - start, 1)}


@mistakes_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.many_pairs", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=at_least(200), nargs="+", default=[5_000, 50_000, 500_000])
    parser.add_argument("--out", type=Path, default=RESULTS / "many_pairs.csv")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage:
        run_stage(options.stage, options.folder)
        return 0
    rows: list[dict[str, Any]] = []
    for count in options.pairs:
        with tempfile.TemporaryDirectory() as name:
            write_pairs(Path(name) / "pairs.parquet", count)
            for stage in STAGES:
                rows.append({"pairs": count, **watched(stage, Path(name))})
                print(rows[-1], flush=True)
                write_csv(options.out, rows)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
