"""A command whose lines are logged as they come, and whose process group ends with its task."""

import io
import signal
import subprocess
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing

from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from spo.runtime.processes import await_group, child_environment, signal_group

GRACE_SECONDS = 60.0  # for a stage to save what it has done, before it is ended
TAIL_LINES = 20  # of a failed command's output, in its error


def logged(command: Sequence[str], *, name: str) -> Generator[str, None, None]:
    """Run a command, log and yield its lines; RuntimeError with the last lines where it fails."""
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
    """A child's environment: unbuffered lines, and the pipeline run for its tracking."""
    run = {"SPO_PIPELINE_RUN": str(flow_run.id), "SPO_FLOW_RUN": str(flow_run.id)} if flow_run.id else {}
    return child_environment(PYTHONUNBUFFERED="1", **run)


class Process:
    """A command in a process group of its own; its output is read by lines, and `close` ends the whole group."""

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
        """Lines of standard output and error, without blank lines; of a progress bar only its last state."""
        for line in self._output:
            if text := line.rstrip().rpartition("\r")[2]:
                yield text

    def wait(self) -> int:
        return self._popen.wait()

    def close(self) -> None:
        """Send SIGTERM to the whole group, and SIGKILL after GRACE_SECONDS to what is left of it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not signal_group(self._popen, number) or await_group(self._popen, GRACE_SECONDS):
                break
        self._popen.wait()
        self._output.close()
