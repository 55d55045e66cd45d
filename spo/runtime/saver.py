"""Saves a training run at intervals, in the background, and once more when it is stopped.

    saver = Saver(store, every_seconds, snapshot, total=steps)
    with saver.saving_when_stopped():
        for step in ...:
            ...
            saver.save_if_due()

Training waits only for a copy of the state on the CPU; a thread writes it. One state is written at a time. An error of
the thread is raised by the next save, or at the end. When a run is stopped while a state is being written, the write is
completed and nothing else is saved: redoing the steps since then takes no longer than another write.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from spo.runtime.checkpoint import State, StateStore
from spo.runtime.stopping import uninterrupted
from spo.runtime.text import byte_size, duration

SHARE_OF_TIME = 0.05  # that copying and writing may take, at most


class HostCopy:
    """A copy of tensors on the CPU, made in the same memory each time; page-locked for a GPU's, which is faster."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The copies by name; they are valid until the next call."""
        kept, self._tensors = self._tensors, {}
        for name, tensor in tensors.items():
            copy = kept.pop(name, None)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._tensors[name] = copy.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return self._tensors


class Saver:
    """Saves what snapshot returns: the state to continue from, whose tensors may be those in training.

    Saving takes at most a twentieth of the run's time. Without a store nothing is saved.
    total: the state's number at the end of the run, in units; resumed: its number at the start if it was loaded.
    """

    def __init__(
        self,
        store: StateStore | None,
        every_seconds: float,
        snapshot: Callable[[], State],
        *,
        total: int,
        unit: str = "step",
        resumed: int | None = None,
    ):
        self._store = store
        self._every = every_seconds
        self._snapshot = snapshot
        self._total = total
        self._unit = unit
        self._half_done = False
        self._copy, self._held = HostCopy(), HostCopy()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._writing: Future[float] | None = None  # its result is the seconds that it took
        self._size = 0  # of the last state, in bytes
        self._rate: float | None = None  # bytes a second, of the last write
        self._took = 0.0  # seconds of the last save: the copy and the write
        self._saved = resumed
        self._start = resumed or 0
        self._started = self._last = time.monotonic()  # _last: when the last state was copied

    def save_if_due(self) -> None:
        """Save if the last save is long enough ago and completed; TrainingError if it failed."""
        if self._is_writing():
            return
        self.wait()
        if self._store and time.monotonic() - self._last >= max(self._every, self._took / SHARE_OF_TIME):
            self.save()

    def save(self) -> None:
        """Copy the state now and write it in the background, after the last write has ended.

        Nothing is done if this state was saved last, or if an uninterruptible block has failed.
        """
        if self._store is None or self._half_done:
            return
        self.wait()
        with uninterrupted():
            start = time.monotonic()
            state = self._snapshot()
            if state.number != self._saved:
                copied = replace(state, tensors=self._copy.take(state.tensors))
                self._begin(state, start)
                self._took = time.monotonic() - start
                self._writing = self._thread.submit(self._write, self._store, copied)

    def wait(self) -> None:
        """Wait for the write in progress; TrainingError if it failed."""
        if self._writing is not None:
            wait([self._writing])  # a signal may end this, and the write is still known
            with uninterrupted():
                writing, self._writing = self._writing, None
                try:
                    seconds = writing.result()
                except BaseException:
                    self._saved = None
                    raise
                self._took += seconds
                self._rate = self._size / max(seconds, 1e-9)

    def hold(self, state: State) -> State:
        """The state with a copy of its tensors on the CPU, valid until the next call; without a store, as it is."""
        return replace(state, tensors=self._held.take(state.tensors)) if self._store else state

    @contextmanager
    def uninterruptible(self) -> Iterator[None]:
        """Delay signals until the block ends; if an error ends it, save nothing."""
        with uninterrupted():
            self._half_done = True
            yield
            self._half_done = False

    @contextmanager
    def saving_when_stopped(self) -> Iterator[None]:
        """Complete the last write at the end of the block; if a signal ends it, save, and print how much is left."""
        try:
            yield
            self.wait()
        except KeyboardInterrupt:
            with uninterrupted():
                self._save_at_stop()
            raise
        except BaseException:
            if self._writing is not None:
                wait([self._writing])
            raise

    def _save_at_stop(self) -> None:
        if self._store is None:
            return
        writing = self._is_writing()
        if writing:
            self._tell_stopping("completing the save of")
        self.wait()
        if not writing and not self._half_done and (state := self._snapshot()).number != self._saved:
            self._begin(state, time.monotonic())
            self._tell_stopping("saving")
            self._write(self._store, state)
        if self._saved is not None:
            print(
                f"stopped at {self._unit} {self._saved} of {self._total}, saved in {self._store.folder}; "
                f"{self._left()}the same command continues from there",
                file=sys.stderr,
                flush=True,
            )

    def _is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def _begin(self, state: State, now: float) -> None:
        self._saved, self._size, self._last = state.number, state.nbytes, now

    @staticmethod
    def _write(store: StateStore, state: State) -> float:
        start = time.monotonic()
        store.save(state)
        return time.monotonic() - start

    def _tell_stopping(self, what: str) -> None:
        text = f"stopping: {what} {self._unit} {self._saved}, {byte_size(self._size)}"
        if self._rate:
            passed = time.monotonic() - self._last
            text += f", about {duration(max(0.0, self._size / self._rate - passed))}"
        print(text, file=sys.stderr, flush=True)

    def _left(self) -> str:
        assert self._saved is not None
        left, done = self._total - self._saved, self._saved - self._start
        if left <= 0:
            return ""
        each = (self._last - self._started) / done if done > 0 else None
        about = f", about {duration(left * each)}" if each else ""
        return f"{left} {self._unit}{'s' * (left != 1)} left{about}; "
