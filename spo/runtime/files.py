"""Atomic writes: a file or folder is written under a temporary name beside its target, then renamed."""

import csv
import glob
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from spo.runtime.stopping import uninterrupted

UMASK = os.umask(0)
os.umask(UMASK)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, where the block makes a file or folder; renamed when the block succeeds.

    The rename replaces what was at `path`. If the block raises, `path` stays and the temporary is removed. It has the
    suffix of `path`. Missing parent folders are made, and what killed processes of this machine left is removed.
    Files of weights get the umask's mode, since safetensors makes them readable by their owner alone.
    FileNotFoundError if the block writes nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_remains(path)
    temporary = _beside(path, "tmp", path.suffix)
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {path}")
        for file in (temporary, *temporary.rglob("*")):
            if file.suffix == ".safetensors":
                file.chmod(0o666 & ~UMASK)
        _sync(temporary)
        with uninterrupted():
            _rename_over(temporary, path)
    finally:
        _remove(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text as it is; no newline is added."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON in the order given; ValueError for nan and infinity, which JSON cannot hold."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the first row's names as the header; floats keep 6 significant digits."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _beside(path: Path, kind: str, suffix: str) -> Path:
    """A hidden name that no other process uses."""
    return path.with_name(f".{path.stem}.{platform.node()}.{os.getpid()}.{kind}{suffix}")


def _clear_remains(path: Path) -> None:
    start = f".{path.stem}.{platform.node()}."
    for remains in path.parent.glob(f"{glob.escape(start)}*"):
        pid, _, kind = remains.name.removeprefix(start).partition(".")
        if not pid.isdecimal() or kind not in (f"old{path.suffix}", f"tmp{path.suffix}") or _lives(int(pid)):
            continue
        if kind.startswith("old") and not path.exists():  # killed between the two renames
            remains.rename(path)
        else:
            _remove(remains)


def _lives(pid: int) -> bool:
    return pid != os.getpid() and psutil.pid_exists(pid)


def _rename_over(source: Path, target: Path) -> None:
    if source.is_dir() and target.is_dir():  # the system renames a folder only over an empty one
        old = _beside(target, "old", target.suffix)
        target.rename(old)
        try:
            source.rename(target)
        except OSError:
            old.rename(target)
            raise
        _remove(old)
    else:
        if target.is_dir() != source.is_dir() and target.exists():
            _remove(target)
        source.replace(target)
    _sync_one(target.parent)


def _sync(path: Path) -> None:
    for inner in path.rglob("*") if path.is_dir() else ():
        _sync_one(inner)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
