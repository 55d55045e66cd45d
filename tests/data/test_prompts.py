import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spo.data.prompts import check_prompt, prompt_hash, read_prompts, split_prompts
from spo.data.rows import RowError, count_reasons
from spo.errors import DataError

PROMPTS = ["a red cross", 'a "blue" circle, large', "ein grüner Würfel"]


def write(path: Path, prompts: list[str]) -> Path:
    records = [{"id": str(i), "prompt": prompt} for i, prompt in enumerate(prompts)]
    match path.suffix:
        case ".txt":
            path.write_text("\n".join(prompts), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(records), encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        case ".csv":
            quoted = [prompt.replace('"', '""') for prompt in prompts]
            path.write_text("id,prompt\n" + "".join(f'{i},"{p}"\n' for i, p in enumerate(quoted)), encoding="utf-8")
        case ".tsv":
            path.write_text("id\tprompt\n" + "".join(f"{i}\t{p}\n" for i, p in enumerate(prompts)), encoding="utf-8")
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_prompts_in_order(tmp_path: Path, suffix: str) -> None:
    assert read_prompts(write(tmp_path / f"prompts{suffix}", PROMPTS)) == (PROMPTS, [])


def test_strings_without_fields_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    assert read_prompts(tmp_path / "a.json") == read_prompts(tmp_path / "a.jsonl") == (PROMPTS, [])


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfprompt\tid\r\none\t1\r\ntwo\t2\r\n")
    assert read_prompts(tmp_path / "a.txt")[0] == read_prompts(tmp_path / "a.tsv")[0] == ["one", "two"]


def test_tsv_marks_enclose_a_field_or_belong_to_it(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('Prompt\tNote\n"GO" on a wall\t\n"say ""hi"""\tx\n')
    assert read_prompts(tmp_path / "a.tsv")[0] == ['"GO" on a wall', 'say "hi"']


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "empty"),
        (" \t\n", "empty"),
        ("\u200b\ufeff", "empty"),
        ("x" * 2001, "too long"),
        (7, "not a string"),
        (None, "not a string"),
        (["a"], "not a string"),
        ("a\0b", "control character"),
        ("a\x1bb", "control character"),
        ("a\ud800b", "broken Unicode"),
    ],
)
def test_a_bad_prompt_is_refused_with_its_reason(value: object, reason: str) -> None:
    with pytest.raises(RowError, match=f"^{reason}") as raised:
        check_prompt(value)
    assert raised.value.reason == reason
    json.dumps(raised.value.excerpt, ensure_ascii=False).encode("utf-8")  # can always be written down


def test_2000_characters_are_allowed() -> None:
    assert len(check_prompt("x" * 2000)) == 2000


@pytest.mark.parametrize(
    "text",
    [
        'prompt;category\n"a cat, sitting";animals\na small house, red roof, sunny;buildings\n',
        "prompt\tcategory\na cat, sitting\tanimals\na small house, red roof, sunny\tx\n",
        "id|caption\n1|a cat, sitting\n2|a small house, red roof, sunny\n",
        'id, prompt\n1, "a cat, sitting"\n2, "a small house, red roof, sunny"\n',
        'ID,Prompt \n1,"a cat, sitting"\n2,"a small house, red roof, sunny"\n',
    ],
    ids=["semicolons", "tabs", "bars", "spaces after commas", "capitals"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32"])
def test_the_header_of_a_csv_tells_its_delimiter_and_its_mark_the_encoding(
    tmp_path: Path, text: str, encoding: str
) -> None:
    mark = "\ufeff" if encoding.endswith("le") else ""
    (tmp_path / "a.csv").write_text(mark + text, encoding=encoding)
    assert read_prompts(tmp_path / "a.csv") == (["a cat, sitting", "a small house, red roof, sunny"], [])


def test_a_prompt_that_its_delimiter_would_cut_is_rejected_whole(tmp_path: Path) -> None:
    for name, comma in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(
            "prompt,style\na cat, with hat,photo\na dog,art\na house,x,,\n".replace(",", comma)
        )
        kept, (rejected,) = read_prompts(tmp_path / name)
        assert kept == ["a dog", "a house"]
        assert (rejected.row, rejected.reason) == (1, "too many fields")
        assert rejected.excerpt.startswith("3 of 2; put the prompt in quotation marks: ['a cat'")


def test_text_in_utf16_is_read_and_a_broken_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a cat\nein grüner Würfel\n日本語".encode("utf-16") + b"x")
    kept, (rejected,) = read_prompts(tmp_path / "a.txt")
    assert kept == ["a cat", "ein grüner Würfel"]
    assert (rejected.row, rejected.reason) == (3, "broken Unicode")


def test_prompts_that_differ_only_in_capitals_are_one_and_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A Cat\na cat\nA  CAT\n")
    kept, rejected = read_prompts(tmp_path / "a.txt")
    assert kept == ["A Cat"]
    assert [item.reason for item in rejected] == ["duplicate", "duplicate"]
    assert prompt_hash("A Cat", 3) == prompt_hash("a cat", 3)


def test_the_files_of_a_folder_are_read_in_order_and_others_refused(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\n\n")
    (tmp_path / "a.jsonl").write_text('"one"\n')
    for name in (".gitignore", "README.md", "b.txt.dvc"):
        (tmp_path / name).write_text("no prompt")
    kept, (rejected,) = read_prompts(tmp_path)
    assert kept == ["one", "two"]
    assert (rejected.source, rejected.row) == (str(tmp_path / "b.txt"), 2)
    (tmp_path / "c.xlsx").write_text("")
    with pytest.raises(DataError, match=r"holds c\.xlsx; it may hold only \.txt.*move it out"):
        read_prompts(tmp_path)


def test_prompts_that_differ_in_spacing_or_unicode_form_are_duplicates(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("caf\u00e9 noir\n  cafe\u0301 \t noir \n", encoding="utf-8")
    kept, rejected = read_prompts(tmp_path / "a.txt")
    assert kept == ["caf\u00e9 noir"]
    assert [(item.row, item.reason, item.excerpt) for item in rejected] == [(2, "duplicate", "caf\u00e9 noir")]


def test_max_prompts_counts_distinct_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\none\n\ntwo\nthree\n")
    assert read_prompts(tmp_path / "a.txt", max_prompts=2)[0] == ["one", "two"]


def test_broken_json_lines_are_rejected_and_the_others_kept(tmp_path: Path) -> None:
    lines = [b'{"prompt": "one"}', b"{broken", b"", b'{"id": 1}', b'{"prompt": "\xff"}', b"[" * 100_000, b'"two"']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    kept, rejected = read_prompts(tmp_path / "a.jsonl")
    assert kept == ["one", "two"]
    reasons = [(item.row, item.reason) for item in rejected]
    broken = [(5, "broken Unicode"), (6, "broken JSON")]
    assert reasons == [(2, "broken JSON"), (3, "empty"), (4, "field missing"), *broken]
    assert all(item.source == str(tmp_path / "a.jsonl") for item in rejected)


def test_text_that_is_not_utf8_is_rejected_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"gr\xfcn\nred\n")
    kept, rejected = read_prompts(tmp_path / "a.txt")
    assert kept == ["red"]
    assert count_reasons(rejected) == {"broken Unicode": 1}


def test_a_short_csv_row_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,prompt\n1,red\n2\n\n")
    kept, rejected = read_prompts(tmp_path / "a.csv")
    assert kept == ["red"]
    assert [(item.row, item.reason) for item in rejected] == [(2, "field missing"), (3, "empty")]


def test_the_only_field_of_strings_is_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1, "words": "red"}\n')
    pq.write_table(pa.table({"n": [1], "words": ["red"]}), tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.jsonl")[0] == read_prompts(tmp_path / "a.parquet")[0] == ["red"]


def test_a_named_field_wins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,other\nred,blue\n")
    assert read_prompts(tmp_path / "a.csv", field="other")[0] == ["blue"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"one,two\nred,blue\n", r"which field is the prompt.*\['one', 'two'\]"),
        ("a.jsonl", b'{"prompt": "a", "text": "b"}\n', r"which field is the prompt.*\['prompt', 'text'\]"),
        ("a.json", b'["a",\n "b",,]', r"a\.json, line 2, column 6: broken JSON"),
        ("a.json", b"[" * 100_000, "broken JSON"),
        ("a.json", b'{"prompts": []}', "holds an object; it should hold a list"),
        ("a.json", b"[]", "holds no prompts; it is empty"),
        ("a.txt", b"", "holds no prompts; it is empty"),
        ("a.csv", b"", "holds no prompts; it is empty"),
        ("a.csv", b"a cat\na dog\n", "its first line 'a cat' names no prompt column; write `prompt` above it"),
        ("a.csv", b'"a cat, sitting on a mat"\n"a dog, running"\n', "'a cat, sitting on a mat' names no prompt column"),
        ("a.csv", b"a cat, on a mat\na dog, running\n", "which field is the prompt.*needs a header line above it"),
        ("a.tsv", b"prompt;category\na cat;x\n", "names no prompt column"),
        ("a.txt", b"\n\n", r"holds no usable prompts: empty \(2\); first .*a\.txt row 1"),
        ("a.csv", b'prompt\n"open\n', r"a\.csv, line 2: .*close every quotation mark"),
        ("a.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("a.xlsx", b"", r"unknown kind; use one of \.txt"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_of_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_prompts(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.csv", "a.parquet"])
def test_a_missing_file_is_a_data_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_an_unknown_field_is_an_error_that_names_the_fields(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=r"has no field 'words'.*\['id', 'prompt'\]"):
        read_prompts(write(tmp_path / f"a{suffix}", PROMPTS), field="words")


MANY = [f"prompt {i}" for i in range(1000)]


def test_a_split_has_exact_counts_and_every_prompt_on_one_side() -> None:
    split = split_prompts(MANY, seed=0, validation_fraction=0.12, test_fraction=0.25)
    assert (len(split.train), len(split.validation), len(split.test)) == (630, 120, 250)
    assert sorted((*split.train, *split.validation, *split.test)) == sorted(MANY)


def test_a_split_depends_on_the_prompts_and_the_seed_but_not_on_their_order() -> None:
    fractions = {"validation_fraction": 0.1, "test_fraction": 0.2}
    assert split_prompts(MANY, seed=3, **fractions) == split_prompts(MANY[::-1], seed=3, **fractions)
    assert split_prompts(MANY, seed=3, **fractions) != split_prompts(MANY, seed=4, **fractions)


def test_few_prompts_still_give_every_side_what_it_needs() -> None:
    split = split_prompts(list("abcde"), seed=0, validation_fraction=0.01, test_fraction=0.01)
    assert (len(split.train), len(split.validation), len(split.test)) == (1, 2, 2)
    with pytest.raises(DataError, match="4 prompts cannot be split"):
        split_prompts(list("abcd"), seed=0, validation_fraction=0.01, test_fraction=0.01)


def test_prompt_hashes_are_uniform_and_never_change() -> None:
    hashes = [prompt_hash(prompt, 0) for prompt in MANY]
    assert all(0 <= value < 1 for value in hashes)
    assert abs(sum(hashes) / len(hashes) - 0.5) < 0.03
    assert prompt_hash("a red cross", 0) == pytest.approx(HASH, abs=1e-12)


HASH = 0.6366888884592191  # of "a red cross" with seed 0
