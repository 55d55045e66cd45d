"""Rows of a user's files: each is used, or rejected with its number and a reason."""

import codecs
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

from spo.errors import DataError

EXCERPT = 80  # characters
MARKS = (  # of byte order; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
codecs.register_error("lone_surrogate", lambda error: ("\ud800", getattr(error, "end", 0)))


@dataclass(frozen=True)
class Rejected:
    """A rejected row, or (row None) a rejected file."""

    source: str
    row: int | None  # from 1: the line of a text or JSON Lines file, else the record
    reason: str  # counted by reason
    excerpt: str


class RowError(DataError):
    """A row cannot be used; `reason` is the kind of error, `excerpt` what was found."""

    def __init__(self, reason: str, found: object = ""):
        text = found if isinstance(found, str) else repr(found)
        self.reason = reason
        self.excerpt = text[:EXCERPT].encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(f"{reason}: {self.excerpt}" if self.excerpt else reason)

    def at(self, source: str | Path, row: int | None) -> Rejected:
        return Rejected(str(source), row, self.reason, self.excerpt)


def count_reasons(rejected: Iterable[Rejected]) -> dict[str, int]:
    """The number of rows for each reason, the commonest first."""
    return dict(Counter(item.reason for item in rejected).most_common())


def nothing_usable(what: str, source: str | Path, reasons: dict[str, int], first: Rejected | None) -> DataError:
    """The error for a source without a usable row; it names the reasons and the first row."""
    if first is None:
        return DataError(f"{source} holds no {what}; it is empty")
    counts = ", ".join(f"{reason} ({n})" for reason, n in reasons.items())
    where = first.source if first.row is None else f"{first.source} row {first.row}"
    return DataError(f"{source} holds no usable {what}: {counts}; first {where}: {first.reason}: {first.excerpt!r}")


def open_text(path: Path, newline: str | None = None) -> TextIOWrapper:
    """Open UTF-8 text, or UTF-16 or UTF-32 with a byte order mark; wrong bytes become surrogates.

    DataError if it fails.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        encoding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8-sig")
        errors = "surrogateescape" if encoding == "utf-8-sig" else "lone_surrogate"
        return path.open(encoding=encoding, errors=errors, newline=newline)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; name an existing file") from None


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Line number and value of each line of JSON Lines; the value of an empty or broken line is a RowError."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, json.loads(line) if line.strip() else RowError("empty")
            except (ValueError, RecursionError):
                yield number, RowError("broken JSON", line.strip())


def json_list(path: Path) -> Iterator[tuple[int, object]]:
    """Number and value of each entry of a JSON list. DataError, naming the place, if the file holds none."""
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


def _kind(value: object) -> str:
    return {dict: "an object", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
