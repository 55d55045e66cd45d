"""Finished batches of an evaluation, with which a killed evaluation resumes.

An entry holds the images and scores of a batch. Its key is a hash of everything they depend on, so an entry is never
stale. At the end of a run, the entries that it did not use are removed.
"""

from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

import spo
from spo.runtime.cache import keep, kept
from spo.runtime.hashing import short_hash

CODE = ("core", "models", "preference", "evaluation", "metrics", "world")
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
HASHED_WHOLE = 64 * 2**20  # bytes; of a larger file only size and time are hashed


class ResultCache:
    """Named tensors by key, in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._used: set[str] = set()

    def get(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The entry; if it is missing, it is made and kept."""
        self._used.add(key)
        path = self.folder / f"{key}.safetensors"
        values = kept(path)
        if values is None:
            values = make()
            keep(path, values)
        return values

    def holds(self, key: str) -> bool:
        return (self.folder / f"{key}.safetensors").is_file()

    def tidy(self) -> None:
        """Remove the entries that were not requested from this object."""
        for path in self.folder.glob("*.safetensors"):
            if path.stem not in self._used:
                path.unlink()


def digest_of_weights(folder: Path) -> str:
    """A hash of a checkpoint's files without its cost."""
    return _digest(path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "cost.json")


def digest_of_model(path: str) -> str:
    """A hash of a model's folder or file; a hub name is returned as it is."""
    place = Path(path)
    if place.is_file():
        return _digest([place])
    return _digest(path for path in sorted(place.rglob("*")) if path.is_file()) if place.is_dir() else path


def digest_of_code() -> str:
    """A hash of our code that makes images and scores, with the versions of its libraries."""
    home = Path(spo.__path__[0])
    files = [path for name in CODE for path in sorted((home / name).rglob("*.py"))]
    return _digest(files) + "".join(f" {name}=={version(name)}" for name in LIBRARIES)


def _digest(files: Iterable[Path]) -> str:
    lines = []
    for path in files:
        status = path.stat()
        content = short_hash(path.read_bytes()) if status.st_size <= HASHED_WHOLE else status.st_mtime_ns
        lines.append(f"{path.name} {status.st_size} {content}")
    return short_hash("\n".join(lines), 16)
