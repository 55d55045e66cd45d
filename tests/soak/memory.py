"""Aligns the embedded default again and again in one process, and tells how its memory and file handles grew.

    python tests/soak/memory.py [MINUTES] [FILE]

Each turn is the stage `align` of the profile tiny at its full size, with tracker, watch, checkpoints and a state after
every round; a line a round goes to FILE (build/soak.csv) as CSV. All pairs are kept, so that updates have the
same few sizes: oneDNN keeps machine code for each new size, up to a limit, which is no leak and would hide one. Memory
is what is resident once the C library's allocator has given back what is free (glibc's malloc_trim): it keeps hundreds
of MiB by it, more or less from round to round. Exit code 1 where the last third of the rounds took more than the first
by more than noise explains.
"""

import contextlib
import csv
import ctypes
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any, TextIO

import psutil

from spo.config import Config, load_config
from spo.runtime.libraries import set_up_libraries
from spo.stages import align, prepare, train_preference
from spo.tracking import NullTracker, Tracker, start

ROOT = Path(__file__).parents[2]
MIB = 2**20
WARM_UP = 24  # rounds, in which caches fill: one turn
GROWTH = 8.0  # MiB between the first and the last third, at most


def placed(config: Config) -> Config:
    """The embedded default with its own models and data, from any folder; its preference model hardly trained."""
    values = config.model_dump()
    values["model"] |= {"path": str(ROOT / config.model.path)}
    values["prepare"]["prompts"] |= {"source": str(ROOT / "data/prompts/world.txt")}
    values["prepare"]["preferences"] |= {"source": str(ROOT / "data/preferences/tiny"), "max_pairs": 200}
    pixel = values["preference_models"]["pixel"]
    pixel |= {"start_from": str(ROOT / pixel["start_from"]), "steps": 2, "candidates": None}
    pixel |= {"evaluate_pairs": 8, "evaluate_timesteps": (1,)}
    values["align"]["spo"] |= {"threshold": 0.0}
    values["safety"] |= {"save_every_seconds": 0.0}
    return Config.model_validate(values)


def trim() -> None:
    """Have the allocator give back what is free; nothing where it is not glibc's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Over(Exception):
    """The time is up."""


class Rows:
    """Memory, handles and threads, once a round; also written to `out` as they come."""

    def __init__(self, out: TextIO, seconds: float):
        self.rows: list[dict[str, float]] = []
        self._out = out
        self._writer = csv.DictWriter(out, ["turn", "round", "seconds", "rss_mib", "handles", "threads"])
        self._writer.writeheader()
        self._process = psutil.Process()
        self._began, self._seconds = time.monotonic(), seconds
        self._last: tuple[int, float] | None = None

    def see(self, turn: int, round_: float) -> None:
        """Measure, unless that round has been seen; raises Over where the time is up."""
        if (turn, round_) == self._last:
            return
        self._last = turn, round_
        gc.collect()
        trim()
        seconds = time.monotonic() - self._began
        row = {
            "turn": turn,
            "round": round_,
            "seconds": round(seconds, 1),
            "rss_mib": round(self._process.memory_info().rss / MIB, 1),
            "handles": self._process.num_fds(),
            "threads": self._process.num_threads(),
        }
        self.rows.append(row)
        self._writer.writerow(row)
        self._out.flush()
        if seconds > self._seconds:
            raise Over


class Watched:
    """A tracker whose updates' metrics tell the rounds."""

    def __init__(self, tracker: Tracker, turn: int, rows: Rows):
        self._tracker, self._turn, self._rows = tracker, turn, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._tracker.log_metrics(metrics, step)
        if "round" in metrics:
            self._rows.see(self._turn, metrics["round"])


def measure(minutes: float, file: Path) -> list[dict[str, float]]:
    config = placed(load_config(ROOT, "tiny"))
    with tempfile.TemporaryDirectory(prefix="spo-soak-") as folder, file.open("w", newline="") as out:
        root = Path(folder)
        prepare.run(config, root=root, tracker=NullTracker())
        train_preference.run(config, "pixel", root=root, tracker=NullTracker())
        rows = Rows(out, 60 * minutes)
        with contextlib.suppress(Over):
            for turn in itertools.count():
                with start(config, "align", root, name="spo", seed=turn) as tracker:
                    align.run(config, "spo", turn, root=root, tracker=Watched(tracker, turn, rows))
        return rows.rows


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    file = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("build/soak.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    set_up_libraries()
    rows = measure(minutes, file)[WARM_UP:]
    third = len(rows) // 3
    if not third:
        print(f"only {len(rows)} rounds after the warm-up; ask for more minutes than {minutes:g}", file=sys.stderr)
        return 1
    first, last = rows[:third], rows[-third:]
    growth = mean(row["rss_mib"] for row in last) - mean(row["rss_mib"] for row in first)
    handles = max(row["handles"] for row in last) - max(row["handles"] for row in first)
    print(
        f"{len(rows)} rounds after {WARM_UP} of warm-up, {rows[-1]['seconds'] / 60:.0f} min: memory "
        f"{rows[0]['rss_mib']:.0f} to {rows[-1]['rss_mib']:.0f} MiB, last third less first {growth:+.1f} MiB; "
        f"file handles {rows[0]['handles']} to {rows[-1]['handles']}"
    )
    return int(growth > GROWTH or handles > 0)


if __name__ == "__main__":
    sys.exit(main())
