"""Sources of preference pairs: JSON Lines beside image files, parquet, or a data set of the Hugging Face hub.

Every source yields raw rows in one shape, a few at a time, whatever the size of the files.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from spo.data.images import MAX_BYTES
from spo.data.rows import RowError, json_lines
from spo.errors import DataError, one_line
from spo.runtime import hub

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

HUB = "hub:"
FILE_BUFFER, HUB_BUFFER = 2**20, 2**23  # bytes of a column read at once; the hub answers slowly
NAMES = {  # of a field, and what files call it
    "caption": ("caption", "prompt"),
    "image_0": ("image_0", "jpg_0"),
    "image_1": ("image_1", "jpg_1"),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
}


@dataclass(frozen=True)
class RawRow:
    """An unchecked row: its fields by the keys of NAMES, or why it has none."""

    source: str
    number: int | None  # from 1; None for a whole file
    fields: Mapping[str, object] | RowError


def raw_rows(source: str, *, root: Path = Path(), split: str = "train") -> Iterator[RawRow]:
    """Rows of a .jsonl or .parquet file, of a folder of such files in order of name, or of hub:NAME's `split`.

    Paths are relative to `root`. DataError if the source does not exist, is of another kind, or the hub does not
    answer.
    """
    if source.startswith(HUB):
        yield from _hub_rows(source.removeprefix(HUB), split)
        return
    for path in _files(root / source):
        if path.suffix.lower() == ".jsonl":
            yield from _json_rows(path)
        else:
            try:
                yield from _parquet_rows(path, str(path), FILE_BUFFER)
            except OSError as error:
                yield RawRow(str(path), None, RowError("file broken", one_line(error)))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.suffix.lower() in (".jsonl", ".parquet"))
        if not files:
            raise DataError(f"preference folder {path} holds no .jsonl or .parquet file")
        return files
    if not path.is_file():
        raise DataError(f"preference source {path} does not exist; name a file, a folder or {HUB}NAME")
    if path.suffix.lower() not in (".jsonl", ".parquet"):
        raise DataError(f"preference file {path} is of an unknown kind; use .jsonl or .parquet")
    return [path]


def _json_rows(path: Path) -> Iterator[RawRow]:
    folder = path.parent.resolve()
    for number, value in json_lines(path):
        fields: Mapping[str, object] | RowError
        try:
            if isinstance(value, RowError):
                raise value
            if not isinstance(value, dict):
                raise RowError("not an object", value)
            names = _find_names(list(value), "field missing")
            fields = {key: value[name] for key, name in names.items()}
            fields |= {key: _read_image(folder, fields[key]) for key in ("image_0", "image_1")}
        except RowError as error:
            fields = error
        yield RawRow(str(path), number, fields)


def _read_image(folder: Path, name: object) -> bytes:
    """The bytes of an image file, which must lie within `folder`; RowError otherwise."""
    if not isinstance(name, str) or not name:
        raise RowError("image missing", name)
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise RowError("image outside its folder", name)
        if not path.is_file():
            raise RowError("image missing", name)
        if path.stat().st_size > MAX_BYTES:
            raise RowError("image too large", f"{name}: more than {MAX_BYTES} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        raise RowError("image missing", f"{name}: {error}") from None


def _parquet_rows(file: Path | BinaryIO, source: str, buffer_size: int) -> Iterator[RawRow]:
    """Rows of one parquet file, read `buffer_size` bytes of a column at a time; OSError passes through."""
    number = 0
    try:
        # pre_buffer, pyarrow's default, would keep whole row groups in memory, the ones already read included
        with pq.ParquetFile(file, buffer_size=buffer_size, pre_buffer=False) as parquet:
            names = _find_names(parquet.schema_arrow.names, "column missing")
            for batch in parquet.iter_batches(batch_size=16, columns=list(names.values()), use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(source, number, {key: _unwrap(row[name]) for key, name in names.items()})
    except RowError as error:
        yield RawRow(source, None, error)
    except (UnicodeDecodeError, pa.ArrowException) as error:
        yield RawRow(source, None, RowError("file broken", f"after row {number}: {one_line(error)}"))


def _unwrap(value: Any) -> object:
    return value.get("bytes") if isinstance(value, dict) else value  # the layout of the hub's image columns


def _find_names(names: Sequence[str], reason: str) -> dict[str, str]:
    found = {key: next((name for name in known if name in names), "") for key, known in NAMES.items()}
    missing = [" or ".join(NAMES[key]) for key, name in found.items() if not name]
    if missing:
        raise RowError(reason, f"no {', '.join(missing)}; there are {', '.join(map(str, names))}")
    return found


def _hub_rows(name: str, split: str) -> Iterator[RawRow]:
    """Stream NAME or NAME@REVISION: its parquet files, or those that the hub made of it."""
    from huggingface_hub import HfFileSystem  # slow to import

    hub.connect()
    system = HfFileSystem()
    for path in _hub_files(system, name, split):
        try:
            with system.open(path, "rb") as file:
                yield from _parquet_rows(file, f"{HUB}{path}", HUB_BUFFER)
        except Exception as error:  # the hub's client passes on the errors of several libraries
            raise DataError(f"{HUB}{path} could not be read to its end: {one_line(error)}; run again") from None


def _hub_files(system: "HfFileSystem", name: str, split: str) -> list[str]:
    of_split = re.compile(rf"/(partial-)?{re.escape(split)}(-[^/]*)?(/[^/]*)?\.parquet$")
    converted = f"{name}@refs/convert/parquet"  # what the hub makes of sets in other formats
    seen: list[str] = []
    try:
        for revision in [name] if "@" in name else [name, converted]:
            try:
                paths = system.find(f"datasets/{revision}")
            except FileNotFoundError:
                if revision != converted:
                    raise
                break
            files = sorted(path for path in paths if path.endswith(".parquet"))
            if found := [path for path in files if of_split.search(path)]:
                return found
            seen += files
    except Exception as error:
        raise DataError(
            f"data set {HUB}{name} cannot be reached: {one_line(error)}; check its name, your access and the "
            "network, or give a local folder"
        ) from None
    files_seen = ", ".join(seen[:3]) or "none"
    raise DataError(f"data set {HUB}{name} has no parquet file of split {split!r}; it has {files_seen}")
