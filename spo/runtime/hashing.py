"""Hashes, each kind in one place. Their values are in caches, saved states and the registry: do not change them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DIGEST_LENGTH = 32  # hexadecimal digits of a SHA-256; MLflow takes 36 at most
SAMPLE = 64 * 2**20  # bytes of one file that `fingerprint` reads at most


def short_hash(data: bytes | str, size: int = 12) -> str:
    """BLAKE2b of bytes or text, as 2 * size hexadecimal digits."""
    return hashlib.blake2b(data.encode() if isinstance(data, str) else data, digest_size=size).hexdigest()


def json_hash(value: Any, size: int = 12) -> str:
    """`short_hash` of a value that JSON can hold, whatever the order of its keys."""
    return short_hash(json.dumps(value, sort_keys=True, ensure_ascii=False), size)


def tensor_hash(tensors: Mapping[str, "Tensor"]) -> str:
    """Hash of names, types, shapes and every bit."""
    import torch

    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """The start of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """The start of the SHA-256 of a file's bytes, or of a folder's files with their names."""
    if path.is_file():
        return file_checksum(path)[:DIGEST_LENGTH]
    files = sorted(each for each in path.rglob("*") if each.is_file())
    return text_digest("".join(f"{file.relative_to(path).as_posix()}\0{content_digest(file)}\n" for file in files))


def fingerprint(path: Path) -> str:
    """Hash of a file's or folder's contents; of a big file only the size and 64 MiB spread over it are read."""
    digest = hashlib.blake2b(digest_size=12)
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\n{size}\n".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(2**20, size * 2**20 // SAMPLE)):
                opened.seek(start)
                digest.update(opened.read(2**20))
    return digest.hexdigest()


def fingerprints(paths: Mapping[str, str | Path | None]) -> dict[str, str]:
    """The fingerprint of each path that exists; names on the hub and unset paths are left out."""
    return {what: fingerprint(Path(path)) for what, path in paths.items() if path and Path(path).exists()}
