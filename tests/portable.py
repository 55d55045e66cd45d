"""Runs what computes as other machines would: with other instruction sets, more threads, and on a busy machine.

    python tests/portable.py [SETTING ...] [-- PYTEST'S OWN ARGUMENTS]

Each setting in turn, all of them by default; then one line a setting. Exit code 1 where one failed. Tests that only
start servers, run git or read text do not depend on any of this and are left out: flows, delivery, hostile input, the
command line, tracking. TEST_PROCESSES=N runs N tests at a time, 2 by default.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/bench/test_bench.py",
    "tests/commands/test_export.py",
    "tests/core",
    "tests/data",
    "tests/evaluation",
    "tests/golden",
    "tests/methods",
    "tests/metrics",
    "tests/models",
    "tests/preference",
    "tests/report",
    "tests/runtime/test_checkpoint.py",
    "tests/runtime/test_distributed.py",
    "tests/stages",
    "tests/test_api.py",
    "tests/test_embedded.py",
    "tests/test_pipeline.py",
    "tests/training",
    "tests/world",
)
BUSY = "busy"
SETTINGS = {  # what torch's, oneDNN's and MKL's kernels are told
    "as it is": {},
    "a processor with SSE4": {
        "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "a processor with AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "4 threads": {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"},
    BUSY: {},
}  # fmt: skip


@contextmanager
def every_core_busy() -> Iterator[None]:
    """Another process on each core, within the block."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def passes(setting: str, options: list[str]) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-n", os.environ.get("TEST_PROCESSES", "2"), *TESTS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **SETTINGS[setting]}
    print(f"== {setting}: {' '.join(f'{k}={v}' for k, v in SETTINGS[setting].items()) or 'nothing set'}", flush=True)
    if setting == BUSY:
        with every_core_busy():
            return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    chosen, options = arguments[:at] or list(SETTINGS), arguments[at + 1 :]
    if unknown := [setting for setting in chosen if setting not in SETTINGS]:
        print(f"error: no setting {unknown}; there are {list(SETTINGS)}", file=sys.stderr)
        return 2
    told, failed = [], False
    for setting in chosen:
        start = time.monotonic()
        passed = passes(setting, options)
        failed |= not passed
        told.append(f"{'passed' if passed else 'FAILED'}: {setting}, {time.monotonic() - start:.0f} s")
    print("\n".join(told), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
