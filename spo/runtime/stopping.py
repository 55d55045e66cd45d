"""SIGTERM, SIGHUP and Ctrl-C end a run where its state can be saved.

with stoppable():              # around a command: the signals raise Stopped
    for step in ...:
        with uninterrupted():  # around a step or a save: a signal waits for its end
            ...

Python drops an exception that is raised in a destructor or a weak reference's callback, and a signal may come there.
So a signal is remembered, and the next `uninterrupted` raises its Stopped again where it was dropped.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end. It is no Exception, which a library might swallow."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in shells: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class _State:
    depth = 0  # of nested `uninterrupted` blocks
    received: int | None = None  # the last signal


@contextmanager
def stoppable() -> Iterator[None]:
    """Signals raise Stopped in the block; a signal that was ignored, such as SIGHUP under nohup, stays ignored.

    Outside of the main thread, where Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _State.depth, _State.received = 0, None
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        _State.received = None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal during the block raises Stopped at the end of the block, unless the block itself raises.

    Outside of the main thread, where no signal arrives, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    if _State.depth == 0 and _State.received is not None and not isinstance(sys.exception(), Stopped):
        raise Stopped(_State.received)


def _handle(number: int, _: FrameType | None) -> None:
    _State.received = number
    if not _State.depth:
        raise Stopped(number)
