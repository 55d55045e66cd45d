"""Work in two processes that talk to each other (gloo, on the CPU)."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from spo.runtime import distributed

SECONDS = 300  # until a hang is one


def in_two_processes(work: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What `work(*arguments)`, a function of a module, returns in each of two processes; files go to `folder`."""
    processes, files = start_two(_save, work, arguments, folder=folder)
    assert end(processes) == [0, 0]
    return [torch.load(file, weights_only=False) for file in files]


def start_two(target: Callable[..., None], *arguments: Any, folder: Path) -> tuple[list[SpawnProcess], list[Path]]:
    """Start `target(file, *arguments)`, a function of a module, in two connected processes; these, and the files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    files = [folder / f"rank-{rank}.pt" for rank in range(2)]
    processes = [spawn.Process(target=_connect, args=(r, port, target, files[r], *arguments)) for r in range(2)]
    for each in processes:
        each.start()
    return processes, files


def end(processes: Sequence[SpawnProcess]) -> list[int | None]:
    """Wait for the processes; the exit code of each, None for one that hung."""
    for each in processes:
        each.join(SECONDS)
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    return codes


def _connect(rank: int, port: int, target: Callable[..., None], *arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.join()
    assert (distributed.rank(), distributed.count()) == (rank, 2)
    target(*arguments)


def _save(file: Path, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.save(work(*arguments), file)
    distributed.leave()
