"""The Hugging Face hub: names of its repositories, and errors where one cannot be loaded."""

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spo.errors import ModelError, one_line

FILES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".json", ".jsonl", ".parquet")  # suffixes
SECONDS = 5.0  # to wait for an answer
_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


def is_name(source: str | Path) -> bool:
    """Whether `source` has the form OWNER/NAME; False if a file or folder has that name."""
    path = Path(source)
    return _NAME.fullmatch(str(source)) is not None and path.suffix not in FILES and not path.exists()


def connect() -> bool:
    """Check once whether the hub answers; if not, its client uses only its cache from now on.

    Otherwise the client would try each file six times over half a minute.
    """
    from huggingface_hub import constants

    if not constants.is_offline_mode() and not _answers():
        constants.HF_HUB_OFFLINE = True
    return not constants.is_offline_mode()


@contextmanager
def loading(what: str, source: str | Path, setting: str, remedy: str, files: str = "") -> Iterator[None]:
    """Turn the libraries' errors while they load `source` into a ModelError of one line.

    what: the source in the message; setting: where the user can name another; remedy: what a local one should be;
    files: from `only`, what to download of a repository.
    """
    if is_name(source):
        connect()
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
        if is_name(source):
            raise ModelError(f"{what} {unavailable(source, setting, error, files)}") from None
        raise ModelError(f"{what} cannot be loaded: {one_line(error)}; {remedy}") from None


def only(*patterns: str, but: Sequence[str] = ()) -> str:
    """Options of `hf download` for the files of some patterns; * also stands for slashes."""
    options = [*(f'--include "{pattern}"' for pattern in patterns), *(f'--exclude "{pattern}"' for pattern in but)]
    return " ".join(options)


def unavailable(name: str | Path, setting: str, error: Exception, files: str = "") -> str:
    """Message: why a repository cannot be loaded, and what to download and where to put it."""
    from huggingface_hub import constants

    why = "the hub cannot be reached" if constants.is_offline_mode() else f"the hub does not give it: {one_line(error)}"
    command = f"hf download {name} --local-dir models/{str(name).split('/')[-1]} {files}".rstrip()
    return (
        f"is no folder here, nor in the hub's cache, and {why}; where there is a network, run `{command}`, bring the "
        f"folder here and name it in {setting}"
    )


@functools.cache
def _answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of any library below the client; the client raises it again if it matters
        return False
    return True
