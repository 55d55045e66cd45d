"""What can go wrong by the user's hand; each ends a command with its one line and no traceback.

    SpoError
    |-- ConfigError   a configuration value or key
    |-- DataError     a prompt file, preference file or image
    |-- ModelError    a model, checkpoint or LoRA that is missing or does not fit
    |-- TrainingError a training run that cannot go on
    `-- LockedError   a stage that another process is running

A message says what, got, allowed, and how to mend it.
"""

import errno


class SpoError(Exception):
    """Base of the errors that are shown as one line."""


class ConfigError(SpoError):
    """A configuration value or key is wrong."""


class DataError(SpoError):
    """A data file, or all of its rows, cannot be used."""


class ModelError(SpoError):
    """A model, checkpoint or LoRA is missing or does not fit."""


class TrainingError(SpoError):
    """A training run cannot go on."""


class LockedError(SpoError):
    """Another process is running the stage."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU or the machine had no more memory, in any library's words."""
    signs = ("out of memory", "DefaultCPUAllocator", f"Error code {errno.ENOMEM}")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def is_disk_full(error: Exception) -> bool:
    """Whether the disk, a quota or a size limit left no room for a file, in any library's words."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("No space left", "Disk quota exceeded", "File too large")
    return getattr(error, "errno", None) in numbers or any(word in str(error) for word in words)


def one_line(error: object, limit: int = 300) -> str:
    """An error's message, or what somebody else has named, without line breaks, cut at `limit` characters."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= limit else message[: limit - 3] + "..."
