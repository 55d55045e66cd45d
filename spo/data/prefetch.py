"""What threads work out ahead of the loop that asks for it, such as pictures: Pillow decodes outside Python's lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
WORKERS = min(8, max(2, os.cpu_count() or 1))


def ahead(function: Callable[[T], R], items: Iterable[T], *, depth: int) -> Iterator[R]:
    """function(item) of each item, in order; at most `depth` results are made or being made beside the one in use.

    Items are taken one at a time by the thread that iterates. What function raises is raised in its place.
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
