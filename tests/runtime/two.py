"""Work in two processes that talk to each other (gloo, on the CPU)."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spo.runtime import distributed

SECONDS = 300  # until a hang is one


def in_two_processes(work: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What `work(*arguments)`, a function of a module, returns in each of two processes; files go to `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    files = [folder / f"rank-{rank}.pt" for rank in range(2)]
    processes = [spawn.Process(target=_process, args=(r, port, files[r], work, arguments)) for r in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(SECONDS)
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    assert codes == [0, 0]
    return [torch.load(file, weights_only=False) for file in files]


def _process(rank: int, port: int, out: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.join()
    torch.save(work(*arguments), out)
    distributed.leave()
