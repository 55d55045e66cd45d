"""Sources of preference pairs: JSON, JSON Lines, parquet or arrow files, or a data set of the Hugging Face hub.

Every source yields raw rows in one shape, a few at a time, whatever the size of the files. Images are in the file, or
files beside it.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from spo.data.images import MAX_BYTES
from spo.data.pair_layouts import Layout, find_layout
from spo.data.rows import RowError, json_lines, json_list
from spo.errors import DataError, one_line
from spo.runtime import hub

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

HUB = "hub:"
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
LABELLED_HERE = "about.json"  # in a folder of `python -m spo label`, whose files have the names of people
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", LABELLED_HERE)  # no rows
FILE_BUFFER, HUB_BUFFER = 2**20, 2**23  # bytes of a column read at once; the hub answers slowly
ROWS_AT_ONCE = 16
_SHARD = re.compile(r"-\d+-of-\d+\.(parquet|jsonl?)$")


@dataclass(frozen=True)
class RawRow:
    """An unchecked pair: its fields by the keys of pair_layouts.LABELLED, or why it has none."""

    source: str
    number: int | None  # of its row, from 1; None for a whole file
    fields: Mapping[str, object] | RowError


def raw_rows(source: str, *, root: Path = Path(), split: str = "train") -> Iterator[RawRow]:
    """Rows of a file, of a folder's files in order of name, or of hub:NAME; of a data set with splits, only of `split`.

    Paths are relative to `root`. DataError if the source does not exist, is of another kind, or the hub does not
    answer.
    """
    if source.startswith(HUB):
        yield from _hub_rows(source.removeprefix(HUB), split)
        return
    files, others = preference_files(root / source, split)
    for path in others:
        yield RawRow(str(path), None, RowError("not of the split", split))
    for path in files:
        yield from _file_rows(path)


def preference_files(path: Path, split: str) -> tuple[list[Path], list[Path]]:
    """The files to read, in order of name, and those of other splits. DataError if there are none to read.

    A folder may be a local copy of a hub data set, its folder data/, or what `datasets.save_to_disk` wrote.
    """
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"preference source {path} does not exist; name a file, a folder or {HUB}NAME")
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"preference file {path} is of an unknown kind; use one of {', '.join(SUFFIXES)}")
        return [path], []
    files = _rows_within(path.iterdir()) or _rows_within(path.rglob("*"))
    if not files:
        raise DataError(f"preference folder {path} holds no {' or '.join(SUFFIXES)} file")
    if (path / LABELLED_HERE).is_file():
        return files, []
    within = _of_split(split)
    found = [file for file in files if within.search(f"/{file.relative_to(path).as_posix()}")]
    if not found and ((path / "dataset_dict.json").is_file() or any(_SHARD.search(file.name) for file in files)):
        seen = ", ".join(file.relative_to(path).as_posix() for file in files[:3])
        raise DataError(
            f"preference folder {path} has no file of split {split!r}, but {seen}; set prepare.preferences.split"
        )
    return found or files, [file for file in files if file not in found] if found else []


def _rows_within(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES and path.name not in ABOUT)


def _of_split(split: str) -> re.Pattern[str]:
    """Matches the paths of a split's files: data/train-00000-of-00001.parquet, default/train/0.parquet, train.json."""
    return re.compile(rf"/(partial-)?{re.escape(split)}(-[^/]*)?(/[^/]*)?\.(parquet|arrow|jsonl?)$")


def _file_rows(path: Path) -> Iterator[RawRow]:
    image = partial(_image, path)
    try:
        match path.suffix.lower():
            case ".parquet":
                yield from _parquet_rows(path, str(path), FILE_BUFFER, image)
            case ".arrow":
                yield from _arrow_rows(path, image)
            case ".json":
                yield from _json_rows(json_list(path), path, image)
            case _:
                yield from _json_rows(json_lines(path), path, image)
    except RowError as error:
        yield RawRow(str(path), None, error)
    except (OSError, DataError) as error:
        yield RawRow(str(path), None, RowError("file broken", one_line(error)))


def _json_rows(rows: Iterable[tuple[int, object]], path: Path, image: Callable[[object], object]) -> Iterator[RawRow]:
    for number, value in rows:
        try:
            if isinstance(value, RowError):
                raise value
            if not isinstance(value, dict):
                raise RowError("not an object", value)
            layout = find_layout(list(value), "field missing")
        except RowError as error:
            yield RawRow(str(path), number, error)
            continue
        yield from _pairs(layout, value, image, str(path), number)


def _pairs(
    layout: Layout, record: Mapping[str, object], image: Callable[[object], object], source: str, number: int
) -> Iterator[RawRow]:
    try:
        for fields in layout.pairs(record, image):
            yield RawRow(source, number, fields)
    except RowError as error:
        yield RawRow(source, number, error)


def _image(file: Path, value: Any) -> object:
    """An image of a row: its bytes, the hub's struct of bytes or path, or a path as in `_read_image`."""
    if isinstance(value, dict):  # the layout of the hub's image columns
        value = value.get("bytes") or value.get("path")
    return _read_image(file, value) if isinstance(value, str) else value


def _read_image(file: Path, name: str) -> bytes:
    """The bytes of an image file in the folder of the data file, or in a folder beside it with its name (HPDv2).

    The path may not lead out of the folder, but a link may, as DVC's do. RowError if there is none.
    """
    if not name:
        raise RowError("image missing", name)
    inner = os.path.normpath(name)
    if os.path.isabs(inner) or inner.split(os.sep)[0] == os.pardir:
        raise RowError("image outside its folder", name)
    try:
        places = (file.parent / inner, file.parent / file.stem / inner)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise RowError("image missing", name)
        if path.stat().st_size > MAX_BYTES:
            raise RowError("image too large", f"{name}: more than {MAX_BYTES} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        raise RowError("image missing", f"{name}: {error}") from None


def _no_file(value: Any) -> object:
    """An image of a file of the hub, which has no files beside it."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value


def _parquet_rows(
    file: Path | BinaryIO, source: str, buffer_size: int, image: Callable[[object], object]
) -> Iterator[RawRow]:
    """Rows of one parquet file, read `buffer_size` bytes of a column at a time; OSError passes through."""
    number = 0
    try:
        # pre_buffer, pyarrow's default, would keep whole row groups in memory, the ones already read included
        with pq.ParquetFile(file, buffer_size=buffer_size, pre_buffer=False) as parquet:
            layout = find_layout(parquet.schema_arrow.names, "column missing")
            columns = list(layout.columns.values())
            for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield from _pairs(layout, row, image, source, number)
    except RowError as error:
        yield RawRow(source, None, error)
    except (UnicodeDecodeError, pa.ArrowException) as error:
        yield RawRow(source, None, RowError("file broken", f"after row {number}: {one_line(error)}"))


def _arrow_rows(path: Path, image: Callable[[object], object]) -> Iterator[RawRow]:
    """Rows of a file of `datasets.save_to_disk`, which stays on the disk."""
    number = 0
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
            layout = find_layout(batches.schema.names, "column missing")
            for batch in batches:
                chosen = batch.select(list(layout.columns.values()))
                for start in range(0, len(chosen), ROWS_AT_ONCE):
                    for row in chosen.slice(start, ROWS_AT_ONCE).to_pylist():
                        number += 1
                        yield from _pairs(layout, row, image, str(path), number)
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise RowError("file broken", f"after row {number}: {one_line(error)}") from None


def _hub_rows(name: str, split: str) -> Iterator[RawRow]:
    """Stream NAME or NAME@REVISION: its parquet files, or those that the hub made of it."""
    from huggingface_hub import HfFileSystem  # slow to import

    hub.connect()
    system = HfFileSystem()
    for path in _hub_files(system, name, split):
        try:
            with system.open(path, "rb") as file:
                yield from _parquet_rows(file, f"{HUB}{path}", HUB_BUFFER, _no_file)
        except Exception as error:  # the hub's client passes on the errors of several libraries
            raise DataError(f"{HUB}{path} could not be read to its end: {one_line(error)}; run again") from None


def _hub_files(system: "HfFileSystem", name: str, split: str) -> list[str]:
    of_split = _of_split(split)
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
