"""The pipeline's independent items side by side, where the machine has cores for them.

`dvc repro` runs one stage after another, and models as small as the embedded default hardly use a second core. Here DVC
runs each preference model, and then each alignment, in a process of its own, and `evaluate` in several processes, whose
results are those of one. DVC still decides what has to run.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from spo.commands.disk_estimate import size_of
from spo.config import Config
from spo.pipeline import PIPELINE, STAGES
from spo.runtime.processes import PROCESSES, await_group, signal_group
from spo.runtime.stopping import uninterrupted

MOST = 4  # items at once, by default
LARGE = 2**28  # bytes of a model's files; its items need much memory, and use all cores alone
PAUSE = 0.1  # seconds between two looks at the processes


def fitting_jobs(config: Config) -> int:
    """How many items to run at once: one for each core; with a GPU, several processes or a large model, only one."""
    import torch

    alone = torch.cuda.is_available() or config.launch.num_processes > 1
    model = Path(config.model.path)
    is_large = not model.exists() or size_of(model) > LARGE
    return 1 if alone or is_large else min(MOST, os.cpu_count() or 1)


def items_of(config: Config) -> list[list[str]]:
    """DVC's names of the items of each stage that may run side by side, in the pipeline's order."""
    matrix = {
        "preference_model": [str(name) for name in config.train_preference],
        "method": [f"{name}-{seed}" for name in config.methods for seed in config.training_seeds],
    }
    return [[f"{name}@{each}" for each in matrix.get(STAGES[name].item, ())] or [name] for name in PIPELINE]


def environment_of(items: Sequence[str], *, jobs: int) -> dict[str, str]:
    """The variables that share the cores among items; `evaluate` takes `jobs` processes where there is no GPU."""
    import torch

    at_once = min(jobs, len(items))
    shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))} if at_once > 1 else {}
    if list(items) == ["evaluate"] and not torch.cuda.is_available():
        shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), PROCESSES: str(jobs)}
    return shared


def run_side_by_side(items: Sequence[str], *, jobs: int, environment: Mapping[str, str], force: bool) -> int:
    """Let DVC run each item, at most `jobs` at a time; the first exit code that is not 0, else 0.

    Lines of the output begin with the item's name. If an item fails, those that run are completed and no other starts.
    A signal that ends this process ends all of them, and each saves its state.
    """
    environment = {**environment_of(items, jobs=jobs), **environment}
    waiting, code = deque(items), 0
    running: list[_Item] = []
    try:
        while running or (waiting and not code):
            while waiting and not code and len(running) < jobs:
                with uninterrupted():  # a started item is known, so that it can be ended
                    running.append(_Item(waiting.popleft(), environment, force=force))
            time.sleep(PAUSE)
            for item in [each for each in running if each.process.poll() is not None]:
                running.remove(item)
                item.output.join()
                code = code or item.process.returncode
    except KeyboardInterrupt:
        with uninterrupted():
            for item in running:
                signal_group(item.process, signal.SIGTERM)
            for item in running:
                await_group(item.process)
                item.output.join()
        raise
    return code


class _Item:
    """`dvc repro` of one item, in a process group of its own, and the thread that forwards its output."""

    def __init__(self, name: str, environment: Mapping[str, str], *, force: bool):
        self.name = name
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
        self.process = subprocess.Popen(
            [*command, *(["--force"] if force else [])],
            env=environment,
            process_group=0,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output = threading.Thread(target=self._forward, daemon=True)
        self.output.start()

    def _forward(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if text := line.decode(errors="replace").rstrip():
                    print(f"{self.name} | {text}", flush=True)
