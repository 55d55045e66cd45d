"""Pairs of pictures to show, which become ready one after another while people look at the first ones."""

import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spo.errors import one_line


@dataclass(frozen=True)
class Pair:
    """Two pictures of a prompt; `facts` go into the row of a choice."""

    id: str  # a hash, which does not say what the pictures are
    prompt: str
    pictures: tuple[Path, Path]
    facts: Mapping[str, object] = field(default_factory=dict)


class Pool:
    """The pairs that are ready. A thread takes them from `pairs`, which makes them."""

    def __init__(self, pairs: Iterable[Pair], *, total: int | None = None):
        self._pairs = pairs
        self._total = total
        self._ready: dict[str, Pair] = {}
        self._changed = threading.Condition()
        self._finished = self._closing = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._make, name="pairs", daemon=True)

    def start(self) -> None:
        """Start the thread and return when the first pair is ready; raises what kept it from being made."""
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished)
            if not self._ready and self._error is not None:
                raise self._error

    def close(self) -> None:
        """End the thread after the pairs at hand."""
        self._closing = True
        if self._thread.is_alive():
            print("waiting for the pictures at hand", file=sys.stderr, flush=True)
        self._thread.join()

    def join(self) -> None:
        """Wait until all pairs are ready."""
        self._thread.join()

    @property
    def ready(self) -> dict[str, Pair]:
        """The pairs so far, in their order."""
        with self._changed:
            return dict(self._ready)

    @property
    def total(self) -> int:
        """The number of pairs that there will be, as far as it is known."""
        return len(self._ready) if self._finished or self._total is None else self._total

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def error(self) -> str | None:
        """Why no more pairs are made, if something went wrong."""
        return None if self._error is None else one_line(self._error)

    def _make(self) -> None:
        try:
            for pair in self._pairs:
                with self._changed:
                    self._ready[pair.id] = pair
                    self._changed.notify_all()
                if self._closing:
                    break
        except Exception as error:  # the page and the terminal show it; `start` raises it
            self._error = error
            if self._ready:
                print(f"error: no more pairs: {self.error}", file=sys.stderr, flush=True)
        with self._changed:
            self._finished = True
            self._changed.notify_all()
