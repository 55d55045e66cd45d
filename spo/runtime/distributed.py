"""One run in several processes, one for each GPU; only this module communicates between them.

Every process holds the same weights and takes the same steps, on its own shard of the prompts and pairs. Results are
gathered in the order in which a single process would make them, and gradients are summed, so a result does not depend
on the number of processes (up to the rounding of sums). `accelerate launch` starts the processes and assigns ranks. In
a single process every function here does nothing.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
BLOCK = 4096  # rows of each process, gathered at a time
BUCKET = 2**25  # numbers of gradients, summed at a time
PATIENCE = timedelta(hours=2)  # of a process that waits for the others, e.g. while the first one writes


def join() -> None:
    """Connect to the other processes that `accelerate launch` started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def leave() -> None:
    """Disconnect from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that writes and reports."""
    return rank() == 0


def share(n: int) -> slice:
    """This process's part of n rows: parts follow one another, differ by one at most, and may be empty."""
    size, rest = divmod(n, count())
    start = rank() * size + min(rank(), rest)
    return slice(start, start + size + (rank() < rest))


def gather(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all processes in the order of ranks; n may differ and be 0, the rest of the shape not.

    `BLOCK` rows of each process are gathered at a time, so a data set on the CPU need not fit on a GPU.
    """
    if count() == 1:
        return rows
    gathering = rows.device
    if dist.get_backend() == "nccl":  # cannot gather CPU tensors
        gathering = torch.device("cuda", torch.cuda.current_device())
    sizes = gather_objects(len(rows))
    parts: list[list[Tensor]] = [[rows[:0]] for _ in sizes]
    for start in range(0, max(sizes), BLOCK):
        own = rows[start : start + BLOCK]
        padded = torch.zeros(min(BLOCK, max(sizes) - start), *rows.shape[1:], dtype=rows.dtype, device=gathering)
        padded[: len(own)] = own
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        for part, block, size in zip(parts, received, sizes, strict=True):
            part.append(block[: max(0, size - start)].to(rows.device))
    return torch.cat([block for part in parts for block in part])


def gather_objects(value: T) -> list[T]:
    """The value of each process, in the order of ranks; for small values, since they are pickled."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def add_up(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over processes, by name; a name that a process lacks counts 0 there."""
    total: dict[str, float] = {}
    for each in gather_objects(dict(values)):
        for name, value in each.items():
            total[name] = total.get(name, 0) + value
    return total


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by the sum over processes; a missing one adds 0, but stays missing if all are.

    A copy of at most BUCKET numbers, or of one gradient that is larger, is in memory beside them.
    """
    if count() == 1:
        return
    parameters = list(parameters)
    have = gather_objects([parameter.grad is not None for parameter in parameters])
    gradients: list[Tensor] = []
    for parameter, *found in zip(parameters, *have, strict=True):
        if any(found):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, in lists of one dtype and of at most BUCKET numbers, or of one larger tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(each.numel() for each in bucket) + tensor.numel() > BUCKET
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def wait() -> None:
    """Wait until all processes have called this."""
    gather_objects(None)


@contextmanager
def written_by_main(output: AbstractContextManager[Path]) -> Iterator[Path]:
    """The path to write a shared result to: `output` in the main process, a temporary folder in the others."""
    if is_main():
        with output as path:
            yield path
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "output"
