"""Aligns the embedded default again and again in one process, and tells how its memory and file handles grew.

    python tests/soak/memory.py [MINUTES] [FILE]

Each turn is the stage `align` over two rounds of the profile tiny, with a tracker, states and checkpoints; a line a
turn goes to FILE (build/soak.csv) as CSV. Memory is what is resident once the C library's allocator has given back what
is free (glibc's malloc_trim): it keeps hundreds of MiB by it, more or less from turn to turn. Exit code 1 where the
last third of the turns took more than the first by more than noise explains.
"""

import contextlib
import csv
import ctypes
import gc
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import psutil

from spo.__main__ import _settle
from spo.config import Config, load_config
from spo.stages import align, prepare, train_preference
from spo.tracking import start

ROOT = Path(__file__).parents[2]
MIB = 2**20
WARM_UP = 5  # turns, in which caches fill
GROWTH = 8.0  # MiB between the first and the last third, at most


def small(config: Config) -> Config:
    """The embedded default with its own models and data, a turn of which takes seconds."""
    values = config.model_dump()
    values["model"] |= {"path": str(ROOT / config.model.path)}
    values["prepare"]["prompts"] |= {"source": str(ROOT / "data/prompts/world.txt")}
    values["prepare"]["preferences"] |= {"source": str(ROOT / "data/preferences/tiny"), "max_pairs": 200}
    values["train_preference"] |= {"start_from": str(ROOT / config.train_preference.start_from), "steps": 2}
    values["train_preference"] |= {"evaluate_pairs": 8, "evaluate_timesteps": (1,)}
    values["align"]["spo"] |= {"rollouts_per_epoch": 2, "prompts_per_rollout": 8, "threshold": 0.0, "batch_size": 64}
    values["safety"] |= {"save_every_seconds": 0.0}
    return Config.model_validate(values)


def trim() -> None:
    """Have the allocator give back what is free; nothing where it is not glibc's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(minutes: float, file: Path) -> list[dict[str, float]]:
    config, rows, process = small(load_config(ROOT, "tiny")), [], psutil.Process()
    with tempfile.TemporaryDirectory(prefix="spo-soak-") as folder, file.open("w", newline="") as out:
        writer = csv.DictWriter(out, ["turn", "seconds", "rss_mib", "handles", "threads"])
        writer.writeheader()
        root, began = Path(folder), time.monotonic()
        for stage in (prepare, train_preference):
            with start(config, stage.__name__, root) as tracker:
                stage.run(config, root=root, tracker=tracker)
        while time.monotonic() - began < 60 * minutes:
            with start(config, "align", root, method="spo", seed=len(rows)) as tracker:
                align.run(config, "spo", len(rows), root=root, tracker=tracker)
            gc.collect()
            trim()
            row = {
                "turn": len(rows),
                "seconds": round(time.monotonic() - began, 1),
                "rss_mib": round(process.memory_info().rss / MIB, 1),
                "handles": process.num_fds(),
                "threads": process.num_threads(),
            }
            rows.append(row)
            writer.writerow(row)
            out.flush()
    return rows


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    file = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("build/soak.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    _settle()
    rows = measure(minutes, file)[WARM_UP:]
    third = len(rows) // 3
    if not third:
        print(f"only {len(rows)} turns after the warm-up; ask for more minutes than {minutes:g}", file=sys.stderr)
        return 1
    first, last = rows[:third], rows[-third:]
    growth = mean(row["rss_mib"] for row in last) - mean(row["rss_mib"] for row in first)
    handles = max(row["handles"] for row in last) - max(row["handles"] for row in first)
    print(
        f"{len(rows)} turns after {WARM_UP} of warm-up, {rows[-1]['seconds'] / 60:.0f} min: memory "
        f"{rows[0]['rss_mib']:.0f} to {rows[-1]['rss_mib']:.0f} MiB, last third less first {growth:+.1f} MiB; "
        f"file handles {rows[0]['handles']} to {rows[-1]['handles']}"
    )
    return int(growth > GROWTH or handles > 0)


if __name__ == "__main__":
    sys.exit(main())
