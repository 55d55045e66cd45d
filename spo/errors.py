"""Errors that the user can correct; each ends a command with one line and no traceback.

    SpoError
    |-- ConfigError   a configuration value or key
    |-- DataError     a prompt file, preference file or image
    |-- ModelError    a model, checkpoint or LoRA that is missing or does not fit
    |-- TrainingError a training run that cannot continue
    `-- LockedError   a stage that another process is running

A message names the setting or file, its value, what is allowed, and the remedy.
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
    """A training run cannot continue."""


class LockedError(SpoError):
    """Another process is running the stage."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or the machine, as any library reports it."""
    signs = ("out of memory", "DefaultCPUAllocator", f"Error code {errno.ENOMEM}")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def is_disk_full(error: Exception) -> bool:
    """Whether the disk, a quota or a size limit left no room for a file, as any library reports it."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    messages = ("No space left", "Disk quota exceeded", "File too large")
    return getattr(error, "errno", None) in numbers or any(message in str(error) for message in messages)


def one_line(error: object, limit: int = 300) -> str:
    """An error's message, or any text from outside, without line breaks and cut at `limit` characters."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= limit else message[: limit - 3] + "..."
