"""Tensors cached in files with a checksum: a damaged file counts as missing."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spo.runtime.files import atomic_path
from spo.runtime.hashing import tensor_hash

ORDER, CHECKSUM = "order", "checksum"  # in the file's metadata; the format sorts the names


def keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors with a checksum."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata={ORDER: json.dumps(list(whole)), CHECKSUM: tensor_hash(whole)})


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors, memory-mapped and not compared with the checksum. Raises OSError if the file is missing."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def kept(path: Path) -> dict[str, Tensor] | None:
    """The tensors in the order in which they were written; None if the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in json.loads(metadata[ORDER])}
            return tensors if tensor_hash(tensors) == metadata[CHECKSUM] else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
