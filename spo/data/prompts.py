"""Prompts: read from a user's file, checked, and split by hash so that no prompt is on two sides.

Files: .txt (one a line), .json (a list of strings or of objects), .jsonl (a string or an object a line),
.csv and .tsv (with a header line) and .parquet.
"""

import csv
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from spo.data.rows import Rejected, RowError, count_reasons, json_lines, nothing_usable, open_text
from spo.errors import DataError, one_line
from spo.runtime.hashing import short_hash

MAX_CHARACTERS = 2000
FIELDS = ("prompt", "caption", "text", "Prompt")  # tried if no field is named
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
_QUOTED = re.compile(r'"(?:[^"]|"")*"')

Row = tuple[int, object]  # the row's number from 1, and its prompt, unchecked


@dataclass(frozen=True)
class Split:
    """Prompts of the three sides, each in the order of its hashes, so the first n are a random sample."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def check_prompt(value: object) -> str:
    """The prompt in NFC with single spaces; RowError if it is empty, too long, no text or has control characters."""
    if isinstance(value, RowError):
        raise value
    if not isinstance(value, str):
        raise RowError("not a string", value)
    categories = {unicodedata.category(character) for character in value if character not in "\t\n\r"}
    if "Cs" in categories:
        raise RowError("broken Unicode", value)
    if "Cc" in categories:
        raise RowError("control character", repr(value))
    prompt = " ".join(unicodedata.normalize("NFC", value).split())
    if categories <= {"Cf", "Zs", "Zl", "Zp"}:  # no visible character
        raise RowError("empty", prompt)
    if len(prompt) > MAX_CHARACTERS:
        raise RowError("too long", f"{len(prompt)} characters, at most {MAX_CHARACTERS}: {prompt}")
    return prompt


def read_prompts(
    path: Path, *, field: str | None = None, max_prompts: int | None = None
) -> tuple[list[str], list[Rejected]]:
    """Read distinct prompts in the file's order, at most `max_prompts` of them, and the rows rejected on the way.

    `field` names the prompt's field where rows have fields; without it, the file must have one field of FIELDS or
    one field of strings. DataError if the file cannot be read, the field is not clear, or no row is usable.
    """
    kept: dict[str, None] = {}
    rejected: list[Rejected] = []
    for number, value in _rows(path, field):
        try:
            prompt = check_prompt(value)
            if prompt in kept:
                raise RowError("duplicate", prompt)
        except RowError as error:
            rejected.append(error.at(path, number))
            continue
        kept[prompt] = None
        if len(kept) == max_prompts:
            break
    if not kept:
        raise nothing_usable("prompts", path, count_reasons(rejected), rejected[0] if rejected else None)
    return list(kept), rejected


def prompt_hash(prompt: str, seed: int) -> float:
    """A number in [0, 1) that depends only on the normalised prompt and the seed."""
    return (int(short_hash(f"{seed}\n{prompt}", 8), 16) >> 11) / 2**53


def split_prompts(prompts: Sequence[str], *, seed: int, validation_fraction: float, test_fraction: float) -> Split:
    """Rank distinct prompts by hash and cut: round(fraction * n) for validation, then test, the rest for training.

    Each side gets at least two, since one prompt gives no interval; DataError if none is left to train on.
    """
    ranked = sorted(prompts, key=lambda prompt: (prompt_hash(prompt, seed), prompt))
    num_validation, num_test = (max(2, round(share * len(ranked))) for share in (validation_fraction, test_fraction))
    held_out = num_validation + num_test
    if held_out >= len(ranked):
        raise DataError(
            f"{len(ranked)} prompts cannot be split into {num_validation} for validation, {num_test} for test and "
            "some for training; give more prompts"
        )
    return Split(tuple(ranked[held_out:]), tuple(ranked[:num_validation]), tuple(ranked[num_validation:held_out]))


def _rows(path: Path, field: str | None) -> Iterator[Row]:
    match path.suffix.lower():
        case ".txt":
            return _lines(path)
        case ".json":
            return _values(_json_list(path), field, path)
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


def _json_list(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        text = file.read()
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is broken JSON: {error}") from None
    if not isinstance(values, list):
        raise DataError(f"{path} holds {_kind(values)}; it should hold a list of strings or of objects")
    return enumerate(values, start=1)


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
        records = _tab_separated(file) if path.suffix.lower() == ".tsv" else _comma_separated(file, path)
        names = next(records, [])
        if not names:
            return
        chosen = field or _choose_field(names, names, path)
        if chosen not in names:
            raise _no_field(chosen, names, path)
        column = names.index(chosen)
        for number, record in enumerate(records, start=1):
            short = RowError("field missing" if record else "empty", f"{len(record)} of {len(names)} fields")
            yield number, record[column] if column < len(record) else short


def _comma_separated(file: TextIO, path: Path) -> Iterator[list[str]]:
    reader = csv.reader(file, strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}; close every quotation mark and double those within a field"
        ) from None


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
    known = [name for name in FIELDS if name in names]
    if len(known) == 1:
        return known[0]
    if not known and len(strings) == 1:
        return strings[0]
    raise DataError(f"{path}: which field is the prompt? Set prepare.prompts.field to one of {known or list(names)}")


def _no_field(field: str, names: Sequence[str], path: Path) -> DataError:
    return DataError(f"{path} has no field {field!r}; set prepare.prompts.field to one of {list(names)}")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _kind(value: object) -> str:
    return {dict: "an object", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
