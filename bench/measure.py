"""Clocks, memory and the machine's own rate: what the benchmarks measure with."""

import argparse
import functools
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import torch

from spo.runtime.environment import processor
from spo.runtime.exit_codes import exit_code

P = ParamSpec("P")
RESULTS = Path("bench/results")


def clock(device: torch.device) -> float:
    """Seconds: of a GPU's wall clock with nothing in flight; of this process's CPU time, which others disturb less."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


class Stopwatch:
    """Seconds by section; a section within another is taken out of the outer one's."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._open: list[str] = []
        self._last = 0.0
        self._timed: list[tuple[Any, str, Any, bool]] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = clock(self._device)
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now

    def time(self, owner: Any, method: str, name: str | Callable[[], str]) -> None:
        """From now on, what `owner.method` takes counts as the section `name`."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.section(name if isinstance(name, str) else name()):
                return inner(*args, **kwargs)

        self._timed.append((owner, method, inner, method in vars(owner)))
        setattr(owner, method, timed)

    def restore(self) -> None:
        """Give back what `time` took: every owner is as before."""
        while self._timed:
            owner, method, inner, its_own = self._timed.pop()
            if its_own:
                setattr(owner, method, inner)
            else:
                delattr(owner, method)


class PeakMemory:
    """Bytes of memory in use, at the most, within the block, and above what was in use before it."""

    def __init__(self, device: torch.device):
        self._device = device

    def __enter__(self) -> "PeakMemory":
        self.before = self._now()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.above = self.peak - self.before

    def _now(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        import psutil  # on a GPU it need not be there

        return psutil.Process().memory_info().rss


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    size, repeats = (8192, 20) if device.type == "cuda" else (1024, 6)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = clock(device)
        a @ b
        best = min(best, clock(device) - start)
    return 2 * size**3 / best


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"


def save(path: Path, result: dict[str, Any]) -> None:
    from spo.runtime.files import write_json

    write_json(path, result)
    print(f"\nall figures: {path}")


def at_least(
    least: float, kind: type[int] | type[float] = int, *, most: float = sys.float_info.max
) -> Callable[[str], Any]:
    """A command line's number from `least` to `most`, for argparse's `type`."""

    def number(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
        return value

    return number


def mistakes_in_one_line(main: Callable[P, int]) -> Callable[P, int]:
    """A command that ends as those of `python -m spo` do."""

    @functools.wraps(main)
    def command(*arguments: P.args, **options: P.kwargs) -> int:
        return exit_code(lambda: main(*arguments, **options))

    return command
