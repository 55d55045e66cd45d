"""Preference pairs: two pictures of one caption, and which one people prefer.

`read_preferences` checks a user's pairs one at a time. `PairWriter` writes them in Pick-a-Pic's parquet layout;
`read_pairs` and `PreferencePairs` read such a file, in order or by index. Images stay encoded;
`spo.data.images.decode_image` decodes them.
"""

import hashlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Self, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spo.data.images import decode_image
from spo.data.preference_files import RawRow, raw_rows
from spo.data.prefetch import ahead
from spo.data.prompts import check_prompt
from spo.data.rows import Rejected, RowError, nothing_usable
from spo.errors import DataError, one_line

SUM_TOLERANCE = 1e-3  # of label_0 + label_1 = 1
SCHEMA = pa.schema(
    {
        "caption": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
    }
)
IMAGES_KNOWN = 32  # the last ones that were decoded
ROWS_AHEAD = 8  # checked ahead, each with two decoded pictures
GROUP_ROWS, GROUP_BYTES = 64, 4 * 2**20  # a row group, which one access by index reads, ends at either


@dataclass(frozen=True)
class PreferencePair:
    """Two encoded images of a caption. The labels are in [0, 1] and sum to 1; a tie is (.5, .5)."""

    caption: str
    image_0: bytes
    image_1: bytes
    label_0: float
    label_1: float

    @property
    def is_tie(self) -> bool:
        return abs(self.label_0 - self.label_1) <= SUM_TOLERANCE


def read_preferences(source: str, *, root: Path = Path(), split: str = "train") -> Iterator[PreferencePair | Rejected]:
    """Check every row of a source (see `raw_rows`), in order and a few at a time; images are decoded to the end.

    DataError if the source cannot be read, or at its end if none of its rows was usable.
    """
    usable = False
    reasons: Counter[str] = Counter()
    first: Rejected | None = None
    for item in ahead(check_pair, raw_rows(source, root=root, split=split), depth=ROWS_AHEAD):
        if isinstance(item, Rejected):
            reasons[item.reason] += 1
            first = first or item
        else:
            usable = True
        yield item
    if not usable:
        raise nothing_usable("preference pairs", source, dict(reasons.most_common()), first)


def check_pair(row: RawRow) -> PreferencePair | Rejected:
    """The pair of a raw row, or the reason for its rejection."""
    try:
        if isinstance(row.fields, RowError):
            raise row.fields
        fields = row.fields
        pair = PreferencePair(
            check_prompt(fields["caption"]),
            _check_image(fields["image_0"]),
            _check_image(fields["image_1"]),
            _check_label(fields["label_0"]),
            _check_label(fields["label_1"]),
        )
        if abs(pair.label_0 + pair.label_1 - 1) > SUM_TOLERANCE:
            raise RowError("labels do not sum to 1", f"{pair.label_0:g} and {pair.label_1:g}")
    except RowError as error:
        return error.at(row.source, row.number)
    return pair


def _check_image(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise RowError("image missing", value)
    _decodes(value)
    return value


@lru_cache(maxsize=IMAGES_KNOWN)
def _decodes(data: bytes) -> None:
    """Decode an image to its end, once for the pairs in a row that share it; RowError if it cannot be decoded."""
    decode_image(data)


def _check_label(value: object) -> float:
    """A number in [0, 1], as any type of column holds one: float, decimal, boolean or text."""
    try:
        label = float(value) if isinstance(value, int | float | Decimal | str) else math.nan
    except (ValueError, OverflowError):
        label = math.nan
    if not 0 <= label <= 1:
        raise RowError("label not in [0, 1]", value)
    return label


class PairWriter:
    """Writes pairs to a parquet file as they come; it holds one row group in memory."""

    def __init__(self, path: Path):
        self.count = 0
        self._rows: list[tuple[object, ...]] = []
        self._bytes = 0
        # pictures do not compress, and statistics of them would be copies of them; a dictionary stores a picture that
        # several pairs of a row group share once
        self._writer = pq.ParquetWriter(
            path, SCHEMA, compression="none", use_dictionary=["caption", "jpg_0", "jpg_1"], write_statistics=False
        )

    def write(self, pair: PreferencePair) -> None:
        self.count += 1
        self._rows.append((pair.caption, pair.image_0, pair.image_1, pair.label_0, pair.label_1))
        self._bytes += len(pair.image_0) + len(pair.image_1)
        if len(self._rows) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(zip(*self._rows, strict=True), SCHEMA.types, strict=True)
            arrays = [pa.array(values, kind) for values, kind in columns]
            self._writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self._rows, self._bytes = [], 0


def read_pairs(path: Path) -> Iterator[PreferencePair]:
    """Pairs of a prepared file in order, a row group at a time; DataError if it is no such file."""
    pairs = PreferencePairs(path)
    return (pairs[index] for index in range(len(pairs)))


class PreferencePairs:
    """Pairs of a prepared file by index; reads only the row group of a pair, at most 64 pairs or 4 MiB.

    DataError if the file is missing or is no prepared file. It can be sent to worker processes.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self._file = pq.ParquetFile(self.path, memory_map=True, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else f"is broken: {one_line(error)}"
            raise DataError(f"preference file {self.path} {why}; run `python -m spo prepare`") from None
        if self._file.schema_arrow.names != SCHEMA.names:
            raise DataError(
                f"preference file {self.path} has columns {self._file.schema_arrow.names}; it needs {SCHEMA.names}: "
                "run `python -m spo prepare`"
            )
        metadata = self._file.metadata
        self._ends = list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
        self._group: tuple[int, pa.Table] | None = None  # the one read last

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> PreferencePair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        group = bisect_right(self._ends, index)
        if self._group is None or self._group[0] != group:
            self._group = (group, self._file.read_row_group(group, use_threads=False))
        offset = index - (self._ends[group - 1] if group else 0)
        return PreferencePair(*(column[offset].as_py() for column in self._group[1].columns))

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    @cached_property
    def captions(self) -> "Captions":
        """Every pair's caption, read without the images."""
        return Captions.of(self._file.read(columns=["caption"], use_threads=False).column(0))

    @cached_property
    def labels(self) -> np.ndarray:
        """Every pair's labels (n, 2), float64, read without the images."""
        table = self._file.read(columns=["label_0", "label_1"], use_threads=False)
        return np.stack([column.to_numpy() for column in table.columns], axis=1)


class Captions(Sequence[str]):
    """Strings in one Arrow array, without a Python object for each."""

    def __init__(self, array: pa.Array):
        self._array = array

    @classmethod
    def of(cls, strings: "Sequence[str] | pa.ChunkedArray") -> "Captions":
        if isinstance(strings, Captions):
            return strings
        if isinstance(strings, pa.ChunkedArray):
            return cls(strings.cast(pa.large_string()).combine_chunks())
        return cls(pa.array(strings, pa.large_string()))

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "Captions": ...

    def __getitem__(self, index: int | slice) -> "str | Captions":
        return Captions(self._array[index]) if isinstance(index, slice) else self._array[index].as_py()

    def take(self, rows: np.ndarray) -> "Captions":
        """Those at rows (k,), int."""
        return Captions(self._array.take(pa.array(rows)))

    def codes(self) -> np.ndarray:
        """A number (n,) for each: equal ones have the same, counted from 0 in the order in which they first appear."""
        return self._array.dictionary_encode().indices.to_numpy()

    def digest(self) -> str:
        """A hash of all of them in their order."""
        found = hashlib.blake2b(digest_size=12)
        for each in self:
            found.update(f"{each}\0".encode())
        return found.hexdigest()
