"""Sources of prompts: text, JSON, JSON Lines, CSV, TSV and parquet files, or a folder of them.

Every source yields raw rows in one shape. No row is cut short: one that does not fit its file's form is rejected.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from spo.data.rows import RowError, json_lines, json_list, open_text
from spo.errors import DataError, one_line

FIELDS = ("prompt", "caption", "text")  # tried if no field is named, whatever their capitals
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
DELIMITERS = ",;\t|"  # of a .csv file
BESIDE = (".md", ".dvc")  # what may lie beside the files of a folder
_QUOTED = re.compile(r'"(?:[^"]|"")*"')

Row = tuple[int, object]  # the row's number from 1, and its prompt, unchecked


class RawPrompt(NamedTuple):
    source: Path
    number: int  # of the row, from 1
    value: object  # unchecked; a RowError where the row holds no prompt


def prompt_rows(path: Path, field: str | None) -> Iterator[RawPrompt]:
    """The rows of a file, or of a folder's files in order of name.

    `field` names the prompt's field where rows have fields; without it, the file must have one field of FIELDS or
    one field of strings. DataError if the source cannot be read, is of another kind, or the field is not clear.
    """
    for file in prompt_files(path):
        for number, value in _rows(file, field):
            yield RawPrompt(file, number, value)


def prompt_files(path: Path) -> list[Path]:
    """The file, or a folder's files in order of name; DataError if the folder has none or one of an unknown kind."""
    if not path.is_dir():
        return [path]
    items = [item for item in sorted(path.iterdir()) if not item.name.startswith(".") and item.suffix not in BESIDE]
    if unknown := [item.name for item in items if item.is_dir() or item.suffix.lower() not in SUFFIXES]:
        raise DataError(f"prompt folder {path} holds {unknown[0]}; it may hold only {', '.join(SUFFIXES)}: move it out")
    if not items:
        raise DataError(f"prompt folder {path} holds no prompt file; use one of {', '.join(SUFFIXES)}")
    return items


def _rows(path: Path, field: str | None) -> Iterator[Row]:
    match path.suffix.lower():
        case ".txt":
            return _lines(path)
        case ".json":
            return _values(json_list(path), field, path)
        case ".jsonl":
            return _values(json_lines(path), field, path)
        case ".csv" | ".tsv":
            return _records(path, field)
        case ".parquet":
            return _column(path, field)
    raise DataError(f"prompt file {path} is of an unknown kind; use one of {', '.join(SUFFIXES)}")


def _lines(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        yield from enumerate((line.rstrip("\n") for line in file), start=1)


def _values(rows: Iterable[Row], field: str | None, path: Path) -> Iterator[Row]:
    """The prompts of JSON values; the first object decides their field."""
    for number, value in rows:
        if isinstance(value, dict):
            if field is None:
                strings = [name for name, item in value.items() if isinstance(item, str)]
                field = _choose_field(list(value), strings, path)
            value = value.get(field, RowError("field missing", f"no {field!r} among {sorted(value)}"))
        yield number, value


def _records(path: Path, field: str | None) -> Iterator[Row]:
    with open_text(path, newline="") as file:
        records = _tab_separated(file) if path.suffix.lower() == ".tsv" else _separated(file, path, field)
        names = [name.strip() for name in next(records, [])]
        if not any(names):
            return
        if field is None and len(names) == 1 and not _known(names):
            raise DataError(
                f"{path}: its first line {one_line(names[0], 80)!r} names no prompt column; write `prompt` above it, "
                "set prepare.prompts.field if it is a header, or call a file of one prompt a line .txt"
            )
        chosen = field or _choose_field(names, names, path)
        if chosen not in names:
            raise _no_field(chosen, names, path)
        column = names.index(chosen)
        for number, record in enumerate(records, start=1):
            yield number, _cell(record, column, len(names))


def _cell(record: Sequence[str], column: int, size: int) -> str | RowError:
    """The field of a record; RowError if it has too few or too many, as after an unquoted delimiter."""
    if any(record[size:]):
        return RowError("too many fields", f"{len(record)} of {size}; put the prompt in quotation marks: {record}")
    if column >= len(record):
        return RowError("field missing" if record else "empty", f"{len(record)} of {size} fields")
    return record[column]


def _separated(file: TextIO, path: Path, field: str | None) -> Iterator[list[str]]:
    """The records of a .csv file, whose header tells the delimiter."""
    first = file.readline()
    delimiter = _delimiter(first, field)
    spaced = f"{delimiter} " in first  # a header such as `id, prompt`
    reader = csv.reader(chain([first], file), delimiter=delimiter, skipinitialspace=spaced, strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}; close every quotation mark and double those within a field"
        ) from None


def _delimiter(header: str, field: str | None) -> str:
    """The one of DELIMITERS that splits off the prompt's field, or else that splits into the most fields."""

    def fit(delimiter: str) -> tuple[bool, int]:
        try:
            record = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:
            return False, 0
        names = [name.strip() for name in record]
        return (field in names if field else bool(_known(names))), len(names)

    return max(DELIMITERS, key=fit)


def _tab_separated(file: TextIO) -> Iterator[list[str]]:
    """Fields without line breaks; quotation marks are text unless they enclose the whole field, as in spreadsheets."""
    for line in file:
        fields = line.rstrip("\r\n").split("\t")
        yield [item[1:-1].replace('""', '"') if _QUOTED.fullmatch(item) else item for item in fields]


def _column(path: Path, field: str | None) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            schema = file.schema_arrow
            chosen = field or _choose_field(schema.names, [item.name for item in schema if _is_text(item.type)], path)
            if chosen not in schema.names:
                raise _no_field(chosen, schema.names, path)
            batches = file.iter_batches(batch_size=1024, columns=[chosen])
            yield from enumerate((value for batch in batches for value in batch.column(0).to_pylist()), start=1)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet: {one_line(error)}") from None


def _choose_field(names: Sequence[str], strings: Sequence[str], path: Path) -> str:
    known = _known(names)
    if len(known) == 1:
        return known[0]
    if not known and len(strings) == 1:
        return strings[0]
    header = (
        "; a first line that is a prompt needs a header line above it"
        if path.suffix.lower() in (".csv", ".tsv")
        else ""
    )
    raise DataError(
        f"{path}: which field is the prompt? Set prepare.prompts.field to one of {known or list(names)}{header}"
    )


def _known(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower() in FIELDS]


def _no_field(field: str, names: Sequence[str], path: Path) -> DataError:
    return DataError(f"{path} has no field {field!r}; set prepare.prompts.field to one of {list(names)}")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
