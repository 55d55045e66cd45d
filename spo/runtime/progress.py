"""Progress of a loop: a bar on a terminal, elsewhere a line every few seconds.

for batch in progress(batches, label="generate"):
    ...

with progress(total=steps, label="train") as bar:
    ...
    bar.update(loss=loss)  # counts one step and shows these values
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Generic, Self, TypeVar

from tqdm import tqdm

from spo.runtime.text import duration

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 5.0
LARGE = 10**9  # bytes of weights that are read in a few seconds


def tell_loading(what: str, files: Iterable[Path]) -> None:
    """Say on stderr that something is being loaded from `files`, if they are large enough to take seconds."""
    if sum(file.stat().st_size for file in files if file.is_file()) >= LARGE and os.environ.get("RANK", "0") == "0":
        print(f"loading {what}", file=sys.stderr, flush=True)


class Progress(Generic[T]):
    """Progress over `iterable`, or over `total` calls of `update`; an iterable with a length needs no total.

    done: steps that an earlier process has done. Only the first process of a distributed run reports, to stderr.
    """

    def __init__(self, iterable: Iterable[T] = (), *, total: int | None = None, done: int = 0, label: str):
        if total is None and isinstance(iterable, Sized) and len(iterable):
            total = len(iterable)
        first = os.environ.get("RANK", "0") == "0"
        self._writes_lines = first and not sys.stderr.isatty()
        disabled = not first or self._writes_lines
        self._bar = tqdm(total=total, initial=done, desc=label, dynamic_ncols=True, disable=disabled)
        self._iterable = iterable
        self._iterated = False
        self._total = total
        self._label = label
        self._shown = ""
        self._done = self._count = done
        self._start = self._last_line = time.monotonic()

    def __iter__(self) -> Iterator[T]:
        self._iterated = True
        with self:
            for item in self._iterable:
                yield item
                self._advance()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._writes_lines:
            self._write_line(last=True)

    def update(self, **shown: object) -> None:
        """Show these values; where nothing is iterated, also count one step."""
        self._shown = ", ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items()
        )
        self._bar.set_postfix_str(self._shown, refresh=False)
        if not self._iterated:
            self._advance()

    def _advance(self) -> None:
        self._count += 1
        self._bar.update()
        if self._writes_lines and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._write_line()

    def _write_line(self, *, last: bool = False) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._start
        count = f"{self._count}" if self._total is None else f"{self._count}/{self._total}"
        parts = [f"{self._label}: {count}" + (f" in {duration(elapsed)}" if last else "")]
        if self._count > self._done and elapsed > 0:
            rate = (self._count - self._done) / elapsed
            parts.append(f"{rate:.2f}/s" if rate >= 1 else f"{1 / rate:.2f} s each")
            if self._total is not None and not last:
                parts.append(f"{duration(max(self._total - self._count, 0) / rate)} left")
        parts += [self._shown] if self._shown else []
        print(", ".join(parts), file=sys.stderr, flush=True)


progress = Progress
