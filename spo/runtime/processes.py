"""Child processes: their environment, process groups that end as a whole, and one command in several processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from spo.config import LaunchConfig
from spo.runtime.stopping import uninterrupted

GRACE_SECONDS = 120.0  # for a stage to save its state before it is killed: 15.7 GB at 130 MB/s
PROCESSES = "SPO_PROCESSES"  # environment variable: replaces launch.num_processes
LAUNCHED = "SPO_LAUNCHED"  # environment variable of the processes that `launch` starts: they start no more


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


def launch(settings: LaunchConfig, arguments: Sequence[str]) -> int:
    """Run `python -m spo ARGUMENTS` in several processes, one for each GPU; returns the exit code.

    Where one of them fails, accelerate ends the others. After a signal they have GRACE_SECONDS, unless the environment
    says otherwise; torch's default is 30.
    """
    import torch

    count = str(settings.num_processes)
    if settings.accelerate_config is not None:
        starter = ["accelerate.commands.launch", "--num_processes", count, "--config_file", settings.accelerate_config]
    elif torch.cuda.is_available():
        options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        starter = ["accelerate.commands.launch", "--num_processes", count, *options]
    else:  # without a GPU accelerate would start only one
        starter = ["torch.distributed.run", "--standalone", "--nproc_per_node", count]
    command = [sys.executable, "-m", *starter, "-m", "spo", *arguments]
    grace = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(round(GRACE_SECONDS))}
    return run_group(command, {**grace, **os.environ, LAUNCHED: "1"})


def await_group(leader: subprocess.Popen[bytes], seconds: float = float("inf")) -> bool:
    """Wait until the leader's group has no process left; False if that takes more than `seconds`."""
    deadline = time.monotonic() + seconds
    while alive := signal_group(leader, 0):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return not alive


def signal_group(leader: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal (0: none) to the group of `leader`; False if the group has no process left."""
    leader.poll()  # a child that has ended but was not awaited still counts as a process
    try:
        os.killpg(leader.pid, number)
    except ProcessLookupError:
        return False
    return True
