"""What can go wrong by the user's hand; each ends a command with its one line and no traceback.

    SpoError
    |-- ConfigError   a configuration value or key
    |-- DataError     a prompt file, preference file or image
    |-- ModelError    a model, checkpoint or LoRA that is missing or does not fit
    |-- TrainingError a training run that cannot go on
    `-- LockedError   a stage that another process is running

A message says what, got, allowed, and how to mend it.
"""


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


def one_line(error: Exception, limit: int = 300) -> str:
    """An error's message without line breaks, cut at `limit` characters."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= limit else message[: limit - 3] + "..."
