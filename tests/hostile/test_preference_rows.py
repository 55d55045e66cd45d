"""Whatever a preference row holds, it gives a checked pair or a rejected row with its reason."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spo.data.preference_files import RawRow
from spo.data.preferences import PreferencePair, check_pair, read_preferences
from spo.data.rows import Rejected
from spo.errors import DataError
from tests.hostile.trying import JSON, assert_one_line, damaged, tries


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
ANY = JSON | st.binary(max_size=20) | st.just(PNG) | st.sampled_from([0.5, 1, 0, 1.0, float("nan"), True, "a cat"])
GOOD = {"caption": "a cat", "image_0": PNG, "image_1": PNG, "label_0": 1.0, "label_1": 0.0}
NAMES = st.sampled_from(
    ["in.png", "../out.png", "/etc/passwd", "link.png", "sub/../../out.png", ".", "", "\0", "a" * 300]
)


def assert_checked(item: PreferencePair | Rejected) -> None:
    if isinstance(item, Rejected):
        assert item.reason
        assert len(item.excerpt) <= 160
    else:
        assert abs(item.label_0 + item.label_1 - 1) < 1e-2
        assert isinstance(item.image_0, bytes) and isinstance(item.image_1, bytes)


@tries(200)
@given(changes=st.dictionaries(st.sampled_from(sorted(GOOD)), ANY, min_size=1))
def test_a_row_of_any_values(changes: dict[str, Any]) -> None:
    assert_checked(check_pair(RawRow("source", 1, {**GOOD, **changes})))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image within the folder, one beside it, and a link from within to that, as DVC makes them."""
    folder = tmp_path_factory.mktemp("parent") / "pairs"
    folder.mkdir()
    for path in (folder / "in.png", folder.parent / "out.png"):
        path.write_bytes(PNG)
    (folder / "link.png").symlink_to(folder.parent / "out.png")
    return folder


def read(source: Path) -> list[PreferencePair | Rejected]:
    try:
        items = list(read_preferences(str(source)))
    except DataError as error:
        assert_one_line(error, 20_000)
        return []
    for item in items:
        assert_checked(item)
    return items


@tries(120)
@given(one=NAMES, other=NAMES)
def test_a_path_out_of_the_folder_is_never_read(folder: Path, one: str, other: str) -> None:
    row = {"caption": "a cat", "image_0": one, "image_1": other, "label_0": 1, "label_1": 0}
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    pairs = [item for item in read(folder / "pairs.jsonl") if isinstance(item, PreferencePair)]
    assert bool(pairs) == ({one, other} <= {"in.png", "link.png"})


@tries(100)
@given(
    rows=st.lists(JSON | st.dictionaries(st.sampled_from(sorted(GOOD)), JSON), max_size=4), noise=st.binary(max_size=30)
)
def test_json_lines_of_any_values(folder: Path, rows: list[Any], noise: bytes) -> None:
    (folder / "any.jsonl").write_bytes("\n".join(map(json.dumps, rows)).encode() + b"\n" + noise)
    read(folder / "any.jsonl")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    pq.write_table(pa.table({name: [value] * 3 for name, value in GOOD.items()}), path)
    return path.read_bytes()


@tries(80)
@given(data=st.data())
def test_a_damaged_parquet_file(tmp_path_factory: pytest.TempPathFactory, parquet: bytes, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged_pairs.parquet"
    path.write_bytes(data.draw(damaged(st.just(parquet))))
    read(path)


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.list_(pa.int8()), pa.struct({"bytes": pa.string()})])
@pytest.mark.parametrize("column", sorted(GOOD))
def test_a_column_of_another_type_rejects_its_rows(tmp_path: Path, column: str, kind: pa.DataType) -> None:
    values = {pa.int64(): 7, pa.string(): "x", pa.list_(pa.int8()): [1]}.get(kind, {"bytes": "x"})
    columns: dict[str, Any] = {name: [value] for name, value in GOOD.items()}
    columns[column] = pa.array([values], kind)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    read(tmp_path / "a.parquet")


def test_a_pipe_in_place_of_an_image_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    row = {"caption": "a cat", "image_0": "pipe.png", "image_1": "in.png", "label_0": 1, "label_1": 0}
    (folder / "pipe.jsonl").write_text(json.dumps(row))
    assert read(folder / "pipe.jsonl") == []
