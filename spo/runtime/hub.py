"""The Hugging Face hub: which names are its, and what to say and do where it cannot be reached."""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spo.errors import ModelError, one_line

FILES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".json", ".jsonl", ".parquet")  # no names of repositories
SECONDS = 5.0  # to wait for an answer
_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


def is_name(source: str | Path) -> bool:
    """Whether it reads OWNER/NAME; a folder of that name goes first."""
    path = Path(source)
    return _NAME.fullmatch(str(source)) is not None and path.suffix not in FILES and not path.exists()


def connect() -> bool:
    """Ask the hub once whether it is there; if not, its client looks into its cache alone from now on.

    Left to itself the client tries each file six times over half a minute, with two lines a time.
    """
    from huggingface_hub import constants

    if not constants.is_offline_mode() and not _answers():
        constants.HF_HUB_OFFLINE = True
    return not constants.is_offline_mode()


@contextmanager
def loading(what: str, source: str | Path, setting: str, remedy: str) -> Iterator[None]:
    """Turn what libraries raise while they load `source` into a ModelError of one line.

    what: names the source in the message; setting: where the user can name another; remedy: what a local one should be.
    """
    if is_name(source):
        connect()
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
        if is_name(source):
            raise ModelError(f"{what} {not_had(source, setting, error)}") from None
        raise ModelError(f"{what} cannot be loaded: {one_line(error)}; {remedy}") from None


def not_had(name: str | Path, setting: str, error: Exception) -> str:
    """Why a repository that is no folder here cannot be had, and what to download and where to put it."""
    from huggingface_hub import constants

    why = "the hub cannot be reached" if constants.is_offline_mode() else f"the hub does not give it: {one_line(error)}"
    return (
        f"is no folder here, nor in the hub's cache, and {why}; where there is a network, run `hf download {name} "
        f"--local-dir models/{str(name).split('/')[-1]}`, bring the folder here and name it in {setting}"
    )


@functools.cache
def _answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of whatever library the client rests on; if it matters, the client meets it again
        return False
    return True
