"""One run in several processes, one for each GPU; only this module and `sharding` communicate between them.

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
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spo.errors import TrainingError

T = TypeVar("T")
BLOCK = 4096  # rows of each process, gathered at a time
BUCKET = 2**23  # gradients in a sum: 34 MB in float32
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


class GradientSum:
    """Replaces each gradient by its sum over processes, in buckets, while the last backward pass of an update goes on.

    The buckets follow the parameters from the last to the first, which is about the order in which their gradients
    become ready. Each is summed as soon as its gradients are ready and the bucket before it has been started, so all
    processes sum the buckets in one order. What a process has no gradient for counts 0 there; where no process has one,
    it stays missing. Gradients become views of their bucket, and only one bucket at a time is in memory twice.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        whole = [each for each in parameters if not isinstance(each, DTensor)]  # FSDP2 sums those of the others
        self._buckets = list(_buckets(whole[::-1])) if count() > 1 else []
        self._awaited: list[set[Tensor]] = []  # parameters of each bucket, in the last backward pass
        self._started: list[Any] = []  # the sums, by bucket
        self._had: list[bool] = []  # whether this process had a gradient, by parameter
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._see, number))

    def expect_last_pass(self) -> None:
        """Call this before the last backward pass of an update; a process without one need not."""
        self._awaited = [set(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Start the sums that are left, and wait for all."""
        if not self._buckets:
            return
        while len(self._started) < len(self._buckets):
            self._start_next()
        had = torch.tensor(self._had, dtype=torch.int32, device=self._buckets[0][0].device)
        dist.all_reduce(had, dist.ReduceOp.MAX)
        for work in self._started:
            work.wait()
        for parameter, anywhere in zip(chain.from_iterable(self._buckets), had.tolist(), strict=True):
            if not anywhere:
                parameter.grad = None
        self._awaited, self._started, self._had = [], [], []

    def _see(self, number: int, parameter: Tensor) -> None:
        """The gradient of a parameter of bucket `number` has grown; in the last backward pass it is now ready."""
        if not self._awaited:
            return
        if parameter not in self._awaited[number]:
            raise TrainingError(
                "a weight got its gradient in two parts of one backward pass, which several processes cannot sum; "
                "checkpoint activations with use_reentrant=False"
            )
        self._awaited[number].remove(parameter)
        while len(self._started) < len(self._buckets) and not self._awaited[len(self._started)]:
            self._start_next()

    @torch.no_grad()
    def _start_next(self) -> None:
        """Start the sum of the next bucket; its gradients become views of one tensor."""
        bucket = self._buckets[len(self._started)]
        flat = torch.zeros(sum(map(Tensor.numel, bucket)), dtype=bucket[0].dtype, device=bucket[0].device)
        for parameter, part in zip(bucket, flat.split([*map(Tensor.numel, bucket)]), strict=True):
            summed = part.as_strided(parameter.shape, parameter.stride())
            if parameter.grad is not None:
                summed.copy_(parameter.grad)
            self._had.append(parameter.grad is not None)
            parameter.grad = summed
        self._started.append(dist.all_reduce(flat, async_op=True))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in their order, in lists of one dtype and of at most BUCKET numbers, or of one larger tensor."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(map(Tensor.numel, bucket)) + parameter.numel() > BUCKET
        if bucket and (full or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def most(number: int) -> int:
    """The largest of the processes' numbers."""
    return max(gather_objects(number))


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
