"""Runs the stages that train in two copies of a project: in one left alone, in the other killed at random moments.

    python tests/stages/killed.py PROJECT KILLS SEED

In PROJECT/alone a stage runs once; in PROJECT/killed again and again, until it has been killed KILLS times. Each run is
a process of its own, forked from this one so that the libraries are imported once, and goes through the command's own
`main`; only MLflow is left out. Every step is saved, while the next one is made. A kill is SIGKILL or SIGTERM, at a
random one of the optimiser's steps, of all file operations or of those of saving, each in turn, or a few milliseconds
after it. What became of each run is printed as JSON.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from spo import tracking
from spo.__main__ import main
from spo.runtime.checkpoint import StateStore
from spo.runtime.libraries import set_up_libraries
from spo.runtime.saver import Saver
from spo.stages import align, prepare, train_preference  # noqa: F401, imported before the forks

MOMENTS = {"saving": 20, "step": 4, "file": 25}  # of a run at most, before it is killed


class Killer:
    """Kills its own process at the `moment`-th of the watched calls, and notes where that was."""

    def __init__(self, at: str, moment: int, number: int, delay: float, note: Path):
        self.at = at
        self._left = moment
        self._number = number
        self._delay = delay
        self._note = note
        self._saving = 0
        self._thread = 0  # the one that saves

    def watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= self.at != "saving" or self._saving > 0
            if self._left == 0:
                self._kill()
            return original(*arguments, **options)

        setattr(owner, name, call)

    def watch_saving(self) -> None:
        original = StateStore.save

        def save(store: StateStore, state: Any) -> None:
            self._saving += 1
            self._thread = threading.get_ident()
            try:
                original(store, state)
            finally:
                self._saving -= 1

        StateStore.save = save  # type: ignore[method-assign]

    def _kill(self) -> None:
        saves = self._saving and self._thread == threading.get_ident()
        self._note.write_text("saving" if saves else "training")
        if self._delay:
            threading.Thread(target=self._later, daemon=True).start()
        else:
            os.kill(os.getpid(), self._number)

    def _later(self) -> None:
        time.sleep(self._delay)
        os.kill(os.getpid(), self._number)


@contextlib.contextmanager
def untracked(*_: Any, **__: Any) -> Any:
    yield tracking.NullTracker()


def child(arguments: list[str], killer: Killer | None, output: int) -> NoReturn:
    """The stage, in a process that ends with its exit code."""
    code = 99
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        if killer is not None:
            if killer.at == "step":
                killer.watch(torch.optim.AdamW, "step")
            else:
                for name in ("fsync", "rename", "replace"):
                    killer.watch(os, name)
                killer.watch(Path, "rename")
            killer.watch_saving()
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str], killer: Killer | None = None) -> int:
    """The exit code of the stage in the current folder; minus the signal's number, where one ended it."""
    with open("output.txt", "ab") as output:
        pid = os.fork()
        if pid == 0:
            child(arguments, killer, output.fileno())
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_until(kills: int, seed: int, arguments: list[str]) -> list[dict[str, Any]]:
    """Kill `kills` runs, then let one come to its end."""
    chance, note, outcomes = random.Random(seed), Path("where.txt").absolute(), []
    while sum(outcome["code"] != 0 for outcome in outcomes) < kills:
        at, number = [*MOMENTS][len(outcomes) % 3], (signal.SIGKILL, signal.SIGTERM)[len(outcomes) % 2]
        delay = chance.choice((0.0, chance.uniform(0, 0.05)))
        note.write_text("")
        code = run(arguments, Killer(at, chance.randint(1, MOMENTS[at]), number, delay, note))
        outcomes.append({"code": code, "signal": number.name, "where": note.read_text()})
        if code == 0:
            break
    outcomes.append({"code": run(arguments), "signal": "", "where": ""})
    return outcomes


def both(kills: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """What became of the runs of each stage in `killed`."""
    assert run(["prepare"]) == 0
    shutil.copytree(".", "alone", ignore=shutil.ignore_patterns("alone"))
    shutil.copytree("alone", "killed")
    outcomes = {}
    for stage in (["train_preference", "pixel"], ["align", "spo"], ["align", "diffusion_dpo"]):
        with contextlib.chdir("alone"):
            assert run(stage) == 0
        with contextlib.chdir("killed"):
            outcomes[" ".join(stage)] = kill_until(kills, seed, stage)
    return outcomes


if __name__ == "__main__":
    project, kills, seed = sys.argv[1:]
    os.chdir(project)
    set_up_libraries()
    torch.set_num_threads(1)
    tracking.start = untracked
    Saver.save_if_due = Saver.save  # type: ignore[method-assign]
    print(json.dumps(both(int(kills), int(seed))))
