"""One DVC stage as one Prefect task. DVC decides what has to run; Prefect shows it, and ends it when told to."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, get_args

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, State

Stage = Literal["prepare", "train_preference", "align", "evaluate", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)

GRACE_SECONDS = 60.0  # for a stage to save what it has done, before it is ended
TAIL_LINES = 20  # of a failed stage's output, in its error


@task(name="stage", task_run_name="{stage}", cache_policy=NO_CACHE, retries=0)
def run_stage(stage: Stage, *, force: bool = False) -> State:
    """Let DVC bring `stage` up to date; a matrix stage's name stands for all of its items.

    The state is named Completed (the stage ran), Restored (DVC had its outputs from an earlier run) or UpToDate
    (nothing had changed). Call it directly: a submitted task cannot be ended.
    RuntimeError with the last lines of the output where the stage fails.
    """
    logger = get_run_logger()
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *(["--force"] if force else []), stage]
    outcome = "UpToDate"
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with closing(_Process(command, _environment())) as process:
        for line in process.lines():
            logger.info(line)
            tail.append(line)
            if re.match(r"Running stage '.+':", line):
                outcome = "Completed"
            elif re.match(r"Stage '.+' is cached - skipping run", line) and outcome == "UpToDate":
                outcome = "Restored"
        code = process.wait()
    if code:
        raise RuntimeError(f"stage {stage} failed (exit code {code}); its last lines:\n" + "\n".join(tail))
    return Completed(name=outcome)


def _environment() -> Mapping[str, str]:
    """The stage's environment: this Python first, lines unbuffered, and the run that its tracking belongs to."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    pipeline_run = {"SPO_PIPELINE_RUN": str(flow_run.id)} if flow_run.id else {}
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "true", **pipeline_run}


class _Process:
    """A command in a process group of its own, whose output is read by lines and which `close` ends, children too."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self._popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._popen.stdout is not None
        self._output = io.TextIOWrapper(self._popen.stdout, encoding="utf-8", errors="replace", newline="\n")

    def lines(self) -> Iterator[str]:
        """Standard output and error as they come, without blank lines; of a progress bar its last state."""
        for line in self._output:
            if text := line.rstrip().rpartition("\r")[2]:
                yield text

    def wait(self) -> int:
        return self._popen.wait()

    def close(self) -> None:
        """SIGTERM to the whole group, and SIGKILL to what is left of it after the grace."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self._signal(number) or self._ended(within=GRACE_SECONDS):
                break
        self._popen.wait()
        self._output.close()

    def _ended(self, *, within: float) -> bool:
        deadline = time.monotonic() + within
        while alive := self._signal(0):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return not alive

    def _signal(self, number: int) -> bool:
        """Send a signal to the group; False where it has no process left."""
        self._popen.poll()  # a child that has ended but was not waited for still counts as one
        try:
            os.killpg(self._popen.pid, number)
        except ProcessLookupError:
            return False
        return True
