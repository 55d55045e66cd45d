"""Advice for a run that does not fit in memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from spo.errors import TrainingError, is_out_of_memory, one_line


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn running out of memory, on a GPU or not, into a TrainingError that gives the setting to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory: {advice} ({one_line(error, 160)})") from None
