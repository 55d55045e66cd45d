"""Whatever a prompt file holds, reading it gives clean prompts and rejected rows with reasons, or one line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo.data.prompt_files import SUFFIXES
from spo.data.prompts import check_prompt, read_prompts
from spo.errors import DataError
from tests.hostile.trying import JSON, assert_one_line, damaged, tries

TEXT = st.text(max_size=40)
LINES = st.lists(st.text(alphabet=st.sampled_from('a"\t,\n\r\\{}[]:é\u200b\x00\ud800'), max_size=12), max_size=8)


def assert_reads_or_explains(path: Path) -> None:
    try:
        prompts, rejected = read_prompts(path)
    except DataError as error:
        assert_one_line(error, 20_000)
        return
    assert prompts == [check_prompt(prompt) for prompt in prompts]
    assert len(set(prompts)) == len(prompts) > 0
    assert all(item.reason and item.row for item in rejected)
    "".join(prompts).encode("utf-8")


@tries(200)
@given(
    suffix=st.sampled_from(SUFFIXES),
    data=st.binary(max_size=80)
    | LINES.map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
    | TEXT.map(str.encode),
)
def test_a_file_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"prompts{suffix}"
    path.write_bytes(data)
    assert_reads_or_explains(path)


@tries(120)
@given(
    rows=st.lists(JSON | st.fixed_dictionaries({"prompt": JSON | TEXT}) | TEXT, max_size=5),
    suffix=st.sampled_from([".json", ".jsonl"]),
)
def test_json_of_any_values(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"prompts{suffix}"
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")
    assert_reads_or_explains(path)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a red cross", "b"], "n": [1, 2]}), path)
    return path.read_bytes()


@tries(80)
@given(data=st.data())
def test_a_damaged_parquet_file(tmp_path_factory: pytest.TempPathFactory, parquet: bytes, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    path.write_bytes(data.draw(damaged(st.just(parquet))))
    assert_reads_or_explains(path)


@tries(150)
@given(
    lines=st.lists(st.text(alphabet='ab,;|\t "é猫', min_size=1, max_size=12), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    quoted=st.booleans(),
)
def test_no_prompt_of_a_csv_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], delimiter: str, encoding: str, quoted: bool
) -> None:
    """Each line is a prompt as a whole, a rejected row, or part of the message; unquoted delimiters cut nothing."""
    path = tmp_path_factory.getbasetemp() / "cut.csv"
    cells = ['"' + line.replace('"', '""') + '"' if quoted else line for line in lines]
    text = "\n".join(f"{cell}{delimiter}x" for cell in cells)
    path.write_text(f"prompt{delimiter}tag\n{text}\n", encoding=encoding)
    if not quoted and any('"' in line for line in lines):
        assert_reads_or_explains(path)
        return
    whole = {" ".join(line.split()) for line in lines}
    try:
        prompts, rejected = read_prompts(path)
    except DataError as error:
        assert_one_line(error, 20_000)
        return
    assert set(prompts) <= whole
    assert len(prompts) + len(rejected) == len(lines)
    if quoted:
        assert {item.reason for item in rejected} <= {"empty", "duplicate"}


def test_a_line_of_many_megabytes_is_one_rejected_row_with_a_short_excerpt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 20_000_000 + "\na red cross\n")
    prompts, [rejected] = read_prompts(tmp_path / "a.txt")
    assert prompts == ["a red cross"]
    assert (rejected.reason, rejected.row) == ("too long", 1)
    assert len(rejected.excerpt) <= 80
