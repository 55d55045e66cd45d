"""One command in several processes."""

import os
import sys
from collections.abc import Sequence

from spo.config import LaunchConfig
from spo.runtime.processes import run_group

LAUNCHED = "SPO_LAUNCHED"  # environment variable of the processes that `launch` starts: they start no more


def launch(settings: LaunchConfig, arguments: Sequence[str]) -> int:
    """Run `python -m spo ARGUMENTS` in several processes, one for each GPU; returns the exit code.

    Where one of them fails, accelerate ends the others.
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
    return run_group(command, {**os.environ, LAUNCHED: "1"})
