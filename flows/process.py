"""Run a command in a task: log its lines as they come, and end its process group with the task."""

import signal
import subprocess
from collections import deque
from collections.abc import Generator, Sequence

from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from spo.runtime.processes import GRACE_SECONDS, await_group, child_environment, signal_group

TAIL_LINES = 20  # of a failed command's output, in its error


def logged(command: Sequence[str], *, name: str) -> Generator[str, None, None]:
    """Run a command, log and yield its lines without blank ones; RuntimeError with the last lines if it fails.

    When the generator is closed, the command's whole process group gets SIGTERM, and SIGKILL after GRACE_SECONDS.
    """
    logger = get_run_logger()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    run = {"SPO_PIPELINE_RUN": str(flow_run.id), "SPO_FLOW_RUN": str(flow_run.id)} if flow_run.id else {}
    process = subprocess.Popen(
        command,
        env=child_environment(PYTHONUNBUFFERED="1", **run),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for output in process.stdout:
            line = output.decode("utf-8", "replace").rstrip().rpartition("\r")[2]  # of a progress bar the last state
            if line:
                logger.info(line)
                tail.append(line)
                yield line
        process.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not signal_group(process, number) or await_group(process, GRACE_SECONDS):
                break
        code = process.wait()
        process.stdout.close()
    if code:
        raise RuntimeError(f"{name} failed (exit code {code}); its last lines:\n" + "\n".join(tail))
