"""Advice for a run that does not fit in memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from spo.errors import TrainingError, is_out_of_memory, one_line


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error of a GPU or CPU into a TrainingError that names the setting to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory: {advice} ({one_line(error, 160)})") from None
