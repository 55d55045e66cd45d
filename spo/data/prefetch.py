"""Threads that compute ahead of a loop, e.g. decode pictures, which Pillow does outside Python's lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
PROCESSES = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of a run on this machine, which share its cores
WORKERS = max(2, min(16, (os.cpu_count() or 1) // PROCESSES))


def ahead(function: Callable[[T], R], items: Iterable[T], *, depth: int) -> Iterator[R]:
    """function(item) for each item, in order; at most `depth` results are computed ahead of the one in use.

    The iterating thread takes the items one at a time. An exception of `function` is raised in the result's place.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(max_workers=min(WORKERS, depth)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
