"""Tensors in numbered files of a folder, written one by one and read through a memory map.

Only the parts of a file that are used are in memory, and the processes of a machine share them. Each file has a
checksum. A file is read to its end to compare it once, or when it has changed since: `checked.json` has the size and
the time of change of the files that were compared.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spo.runtime.cache import keep, kept, mapped
from spo.runtime.files import read_json, write_json

CHECKED = "checked.json"


class Shards:
    """`count` files of named tensors in a folder."""

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self._files = [folder / f"{number:06d}.safetensors" for number in range(count)]

    def missing(self) -> list[int]:
        """The numbers of the files that are not there or are damaged."""
        try:
            checked = read_json(self.folder / CHECKED)
        except (OSError, ValueError):
            checked = {}
        return [i for i, file in enumerate(self._files) if not _is_whole(file, checked.get(file.name))]

    def keep(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a file."""
        keep(self._files[number], tensors)

    def mark_checked(self) -> None:
        """Note that all files are whole."""
        write_json(self.folder / CHECKED, {file.name: _state(file) for file in self._files})

    def read(self) -> list[dict[str, Tensor]]:
        """The tensors of each file, memory-mapped. Raises OSError if a file is missing."""
        return [mapped(file) for file in self._files]


class Sharded:
    """Rows (m, ...) that lie in several tensors; a tensor of row numbers indexes them like those of one tensor."""

    def __init__(self, parts: Sequence[Tensor]):
        self._parts = parts
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """The rows at index (...), int: (..., rest of the shape)."""
        rows = index.flatten()
        part_of = torch.bucketize(rows, self._ends, right=True)
        found = torch.empty(len(rows), *self.shape[1:], dtype=self._parts[0].dtype)
        for number in part_of.unique().tolist():
            here, part = part_of == number, self._parts[number]
            found[here] = part[rows[here] - self._ends[number] + len(part)]
        return found.view(*index.shape, *self.shape[1:])


def _is_whole(file: Path, checked: list[int] | None) -> bool:
    return file.is_file() and (_state(file) == checked or kept(file) is not None)


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]
