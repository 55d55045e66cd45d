"""A command whose lines are shown as they come, and whose whole process group ends with the task that runs it."""

import io
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from prefect.logging import get_run_logger
from prefect.runtime import flow_run

GRACE_SECONDS = 60.0  # for a stage to save what it has done, before it is ended
TAIL_LINES = 20  # of a failed command's output, in its error


def logged(command: Sequence[str], *, name: str) -> Generator[str, None, None]:
    """Run it and yield its lines, each logged; RuntimeError with the last ones where it fails."""
    logger = get_run_logger()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with closing(Process(command, environment())) as process:
        for line in process.lines():
            logger.info(line)
            tail.append(line)
            yield line
        code = process.wait()
    if code:
        raise RuntimeError(f"{name} failed (exit code {code}); its last lines:\n" + "\n".join(tail))


def environment() -> Mapping[str, str]:
    """This Python first, lines unbuffered, and the run that its tracking belongs to."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    run = {"SPO_PIPELINE_RUN": str(flow_run.id), "SPO_FLOW_RUN": str(flow_run.id)} if flow_run.id else {}
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "true", **run}


class Process:
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
