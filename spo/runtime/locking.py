"""One run of a stage at a time: a second one is refused, with the process that runs the first."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from spo.errors import LockedError


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Lock the file `path` for the block; LockedError if another process has it. A killed process frees its lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_name(f"{path.name}.txt")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        process = ""
        with suppress(OSError, ValueError):  # the process is about to write this file, or to end
            process = holder.read_text(encoding="utf-8")
        raise LockedError(
            f"{what} is running already: {process or 'an unknown process'}; wait for its end or stop it, then run this "
            "again"
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        holder.write_text(f"process {os.getpid()} on {platform.node()} since {since}", encoding="utf-8")
        yield
        holder.unlink(missing_ok=True)
    finally:
        lock.release()
