"""The device of tensors, and its memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spo.errors import TrainingError, is_out_of_memory, one_line


def best_device() -> torch.device:
    """The current GPU, or the CPU if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error of a GPU or CPU into a TrainingError that names the setting to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory: {advice} ({one_line(error, 160)})") from None
