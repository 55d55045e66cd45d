"""Child processes: their environment, and process groups that end as a whole."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from spo.runtime.stopping import uninterrupted


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment with `variables`, this Python first in PATH and DVC's analytics off."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {"DVC_NO_ANALYTICS": "true", **os.environ, "PATH": path, **variables}


def run_group(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command in a process group of its own; returns its exit code.

    A signal that ends this process is passed on as SIGTERM to the whole group, whose end is then awaited: DVC alone
    would leave its stage running, and a stage saves its state.
    """
    with subprocess.Popen(command, env=environment, process_group=0) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            with uninterrupted():
                signal_group(process, signal.SIGTERM)
                await_group(process)
            raise


def await_group(leader: subprocess.Popen[bytes], seconds: float = float("inf")) -> bool:
    """Wait until the leader's group has no process left; False where that takes more than `seconds`."""
    deadline = time.monotonic() + seconds
    while alive := signal_group(leader, 0):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return not alive


def signal_group(leader: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal (0: none) to the group of `leader`; False where the group has no process left."""
    leader.poll()  # a child that has ended but was not awaited still counts as a process
    try:
        os.killpg(leader.pid, number)
    except ProcessLookupError:
        return False
    return True
