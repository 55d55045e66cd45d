import io
import json
import multiprocessing
import pickle
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from spo.data.preference_files import raw_rows
from spo.data.preferences import PairWriter, PreferencePair, PreferencePairs, read_pairs, read_preferences
from spo.data.rows import Rejected
from spo.errors import DataError


def picture(shade: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 100, 30)).save(buffer, kind)
    return buffer.getvalue()


def pair(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "caption": f"picture {number}",
        "jpg_0": picture(number),
        "jpg_1": picture(number + 1, "JPEG"),
        "label_0": 1.0,
        "label_1": 0.0,
    } | changes


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows as JSON Lines with image files."""
    with (folder / "pairs.jsonl").open("w") as file:
        for number, row in enumerate(rows):
            fields = {key: value for key, value in row.items() if not key.startswith("jpg_")}
            for side in (0, 1):
                (folder / f"{number}-{side}").write_bytes(row[f"jpg_{side}"])
                fields[f"image_{side}"] = f"{number}-{side}"
            file.write(json.dumps(fields) + "\n")
    return folder / "pairs.jsonl"


def read(source: Path) -> tuple[list[PreferencePair], list[Rejected]]:
    items = list(read_preferences(str(source)))
    return [i for i in items if isinstance(i, PreferencePair)], [i for i in items if isinstance(i, Rejected)]


def prepared(path: Path, count: int) -> list[PreferencePair]:
    pairs = [PreferencePair(f"picture {i % 70}", picture(i), picture(i + 1), i % 2, 1 - i % 2) for i in range(count)]
    with PairWriter(path) as writer:
        for item in pairs:
            writer.write(item)
    return pairs


def test_json_lines_and_parquet_hold_the_same_pairs(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(40)]
    write_parquet(tmp_path / "pairs.parquet", rows)
    expected = [PreferencePair(r["caption"], r["jpg_0"], r["jpg_1"], 1.0, 0.0) for r in rows]
    assert read(tmp_path / "pairs.parquet") == read(write_jsonl(tmp_path, rows)) == (expected, [])


def test_image_columns_of_the_hub_and_other_names_are_understood(tmp_path: Path) -> None:
    row = pair()
    images = {f"image_{side}": {"bytes": row[f"jpg_{side}"], "path": "x.png"} for side in (0, 1)}
    write_parquet(tmp_path / "a.parquet", [{"prompt": "a", "label_0": 0, "label_1": 1, "extra": 3} | images])
    (found,), _ = read(tmp_path / "a.parquet")
    assert (found.caption, found.image_0, found.label_1) == ("a", row["jpg_0"], 1.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"caption": "  "}, "empty"),
        ({"caption": "x" * 2001}, "too long"),
        ({"caption": "a\0"}, "control character"),
        ({"caption": None}, "not a string"),
        ({"label_0": 1.5, "label_1": -0.5}, "label not in [0, 1]"),
        ({"label_0": float("nan")}, "label not in [0, 1]"),
        ({"label_0": None}, "label not in [0, 1]"),
        ({"label_0": 0.0}, "labels do not sum to 1"),
        ({"label_0": 0.5, "label_1": 0.502}, "labels do not sum to 1"),
        ({"jpg_0": b""}, "image empty"),
        ({"jpg_1": picture()[:60]}, "image broken"),
        ({"jpg_1": b"<html>"}, "image broken"),
    ],
)
def test_a_bad_row_is_rejected_and_its_neighbours_kept(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    rows = [pair(0), pair(1, **changes), pair(2)]
    write_parquet(tmp_path / "pairs.parquet", rows)
    for source in (tmp_path / "pairs.parquet", write_jsonl(tmp_path, rows)):
        kept, rejected = read(source)
        assert [item.caption for item in kept] == ["picture 0", "picture 2"]
        assert [(item.source, item.row, item.reason) for item in rejected] == [(str(source), 2, reason)]


def test_labels_may_be_ties_and_within_the_tolerance(tmp_path: Path) -> None:
    labels = [(0.5, 0.5), (0.5, 0.5005), (1, 0), (0.25, 0.75)]
    write_parquet(tmp_path / "a.parquet", [pair(label_0=float(a), label_1=float(b)) for a, b in labels])
    assert [item.is_tie for item in read(tmp_path / "a.parquet")[0]] == [True, True, False, False]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "broken JSON"),
        ("", "empty"),
        ("[1]", "not an object"),
        ('{"caption": "a", "image_0": "0-0", "image_1": "0-1", "label_0": 1}', "field missing"),
        ('{"caption": "a", "image_0": "no", "image_1": "0-1", "label_0": 1, "label_1": 0}', "image missing"),
        ('{"caption": "a", "image_0": "a\\u0000", "image_1": "0-1", "label_0": 1, "label_1": 0}', "image missing"),
        ('{"caption": "a", "image_0": ".", "image_1": "0-1", "label_0": 1, "label_1": 0}', "image missing"),
        ('{"caption": "a", "image_0": 3, "image_1": "0-1", "label_0": 1, "label_1": 0}', "image missing"),
        ('{"caption": "a", "image_0": "../out", "image_1": "0-1", "label_0": 1, "label_1": 0}', "image outside"),
        ('{"caption": "a", "image_0": "/etc/hosts", "image_1": "0-1", "label_0": 1, "label_1": 0}', "image outside"),
        ('{"caption": "a", "image_0": "x/../../out", "image_1": "0-1", "label_0": 1, "label_1": 0}', "image outside"),
        ('{"caption": "a", "image_0": "0-0", "image_1": "0-1", "label_0": [1], "label_1": 0}', "label not in"),
        ('{"caption": "a", "image_0": "0-0", "image_1": "0-1", "label_0": "yes", "label_1": 0}', "label not in"),
        ('{"prompt": "a", "image_path": ["0-0", "0-1"], "human_preference": [1]}', "ranks do not fit"),
        ('{"prompt": "a", "generations": ["0-0", "0-1"], "rank": ["a", "b"]}', "ranks do not fit"),
        ('{"prompt": "a", "images": ["0-0", "0-1"], "comparisons": [[0, 2, 1]]}', "comparisons do not fit"),
        ('{"prompt": "a", "images": ["0-0", "0-1"], "comparisons": [[-1, 0, 1]]}', "comparisons do not fit"),
        ('{"prompt": "a", "images": ["0-0", "0-1"], "comparisons": [[0, 1]]}', "comparisons do not fit"),
        ('{"prompt": "a", "images": ["0-0", "0-1"], "comparisons": [[[0], 1, 1]]}', "comparisons do not fit"),
        ('{"prompt": "a", "images": ["0-0", "0-1"], "comparisons": [[0, 1, 2]]}', "label not in"),
        ('{"prompt": "a", "path1": "0-0", "path2": "no"}', "image missing"),
    ],
)
def test_a_bad_json_line_is_rejected(tmp_path: Path, line: str, reason: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "out").write_bytes(picture())
    source = write_jsonl(folder, [pair()])
    source.write_text(source.read_text() + line + "\n")
    kept, (rejected,) = read(source)
    assert len(kept) == 1
    assert rejected.row == 2
    assert rejected.reason.startswith(reason)


def test_an_image_may_be_a_link_out_of_the_folder(tmp_path: Path) -> None:
    """DVC's `cache.type symlink` makes such links."""
    folder = tmp_path / "set"
    folder.mkdir()
    source = write_jsonl(folder, [pair()])
    for side in (0, 1):
        (folder / f"0-{side}").rename(tmp_path / f"cached-{side}")
        (folder / f"0-{side}").symlink_to(tmp_path / f"cached-{side}")
    assert read(source) == ([PreferencePair("picture 0", picture(0), picture(1, "JPEG"), 1.0, 0.0)], [])


@pytest.mark.parametrize("labels", [(True, False), ("1", "0"), (Decimal(1), Decimal(0)), (1, 0), ("1.0", " 0 ")])
def test_labels_are_read_whatever_the_type_of_their_column(tmp_path: Path, labels: tuple[Any, Any]) -> None:
    write_parquet(tmp_path / "a.parquet", [pair(label_0=labels[0], label_1=labels[1])])
    (found,), _ = read(tmp_path / "a.parquet")
    assert (found.label_0, found.label_1) == (1.0, 0.0)


def test_paths_in_place_of_bytes_are_read_beside_a_parquet_file(tmp_path: Path) -> None:
    for side in (0, 1):
        (tmp_path / f"{side}.png").write_bytes(picture(side))
    names = {"jpg_0": "0.png", "jpg_1": {"bytes": None, "path": "1.png"}}
    write_parquet(tmp_path / "a.parquet", [pair(**names), pair(jpg_0="../0.png", jpg_1=names["jpg_1"])])
    (found,), (rejected,) = read(tmp_path / "a.parquet")
    assert (found.image_0, found.image_1) == (picture(0), picture(1))
    assert rejected.reason == "image outside its folder"


@pytest.mark.parametrize("names", [("win", "lose"), ("image_win", "image_lose"), ("chosen", "rejected")])
def test_columns_of_winner_and_loser_are_read(tmp_path: Path, names: tuple[str, str]) -> None:
    write_parquet(tmp_path / "a.parquet", [{"prompt": "a", names[0]: picture(0), names[1]: picture(1), "extra": 2}])
    assert read(tmp_path / "a.parquet") == ([PreferencePair("a", picture(0), picture(1), 1.0, 0.0)], [])


@pytest.mark.parametrize(
    ("record", "labels"),
    [
        ({"image_path": ["0.png", "1.png"], "human_preference": [0, 1]}, {(0, 1): 0.0}),  # HPDv2's train.json
        ({"image_path": ["0.png", "1.png", "2.png"], "rank": [2, 1, 3]}, {(0, 1): 0.0, (0, 2): 1.0, (1, 2): 1.0}),
        ({"generations": ["0.png", "1.png"], "rank": [1, 1], "overall_rating": [5, 5]}, {(0, 1): 0.5}),  # ImageReward
        ({"path1": "0.png", "path2": "1.png", "confidence": 0.9}, {(0, 1): 1.0}),  # HPDv3
        ({"images": ["0.png", "1.png", "2.png"], "comparisons": [[2, 0, 1], [0, 1, 0.5]]}, {(2, 0): 1.0, (0, 1): 0.5}),
    ],
)
@pytest.mark.parametrize("place", ["", "train"])
def test_json_of_published_data_sets_is_read(
    tmp_path: Path, record: dict[str, Any], labels: dict[tuple[int, int], float], place: str
) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    for number in range(3):
        (tmp_path / place / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "a", **record}]))
    (tmp_path / "test.json").write_text(json.dumps([]))
    expected = [PreferencePair("a", picture(i), picture(j), p, 1 - p) for (i, j), p in labels.items()]
    assert read(tmp_path / "train.json") == (expected, [])
    found, (other,) = read(tmp_path)
    assert found == expected
    assert (Path(other.source).name, other.row, other.reason) == ("test.json", None, "not of the split")


class TestSplits:
    @pytest.fixture(params=["root", "data"])
    def snapshot(self, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
        """A local copy of a hub data set, or its data folder."""
        (tmp_path / "data").mkdir()
        (tmp_path / "README.md").write_text("a card")
        for name in ("train", "test", "validation_unique"):
            write_parquet(tmp_path / f"data/{name}-00000-of-00001.parquet", [pair(caption=name)])
        return tmp_path if request.param == "root" else tmp_path / "data"

    @pytest.mark.parametrize("split", ["train", "validation_unique"])
    def test_only_the_asked_split_of_a_local_copy_is_read(self, snapshot: Path, split: str) -> None:
        items = list(read_preferences(str(snapshot), split=split))
        assert [item.caption for item in items if isinstance(item, PreferencePair)] == [split]
        assert [item.reason for item in items if isinstance(item, Rejected)] == ["not of the split"] * 2

    def test_an_unknown_split_is_an_error_that_names_files(self, snapshot: Path) -> None:
        with pytest.raises(DataError, match=r"no file of split 'all', but .*test-0.*; set prepare\.preferences\.split"):
            list(read_preferences(str(snapshot), split="all"))

    @pytest.mark.parametrize("name", ["train", "train-er", "test"])
    def test_names_of_people_are_no_splits(self, tmp_path: Path, name: str) -> None:
        for annotator in (name, "anna"):
            (tmp_path / annotator).mkdir()
            write_jsonl(tmp_path / annotator, [pair(caption=annotator)]).rename(tmp_path / f"{annotator}.jsonl")
        (tmp_path / "about.json").write_text("{}")
        items = list(read_preferences(str(tmp_path)))
        assert [item.caption for item in items if isinstance(item, PreferencePair)] == ["anna", name]

    def test_what_save_to_disk_writes_is_read(self, tmp_path: Path) -> None:
        for name in ("train", "test"):
            (tmp_path / name).mkdir()
            table = pa.Table.from_pylist([pair(i, caption=name) for i in range(40)])
            with pa.ipc.new_stream(tmp_path / name / "data-00000-of-00001.arrow", table.schema) as file:
                file.write_table(table)
            for about in ("state.json", "dataset_info.json"):
                (tmp_path / name / about).write_text("{}")
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        expected = [PreferencePair("train", picture(i), picture(i + 1, "JPEG"), 1.0, 0.0) for i in range(40)]
        assert read(tmp_path / "train") == (expected, [])
        assert read(tmp_path)[0] == expected
        (tmp_path / "train/data-00000-of-00001.arrow").write_bytes(b"no arrow")
        with pytest.raises(DataError, match="file broken: 'after row 0"):
            read(tmp_path / "train")


def test_files_of_a_folder_are_read_in_order_and_bad_ones_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [pair(1)])
    write_parquet(tmp_path / "b.parquet", [{"caption": "a", "label_0": 1.0}])
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    write_parquet(tmp_path / "d.parquet", [pair(2)])
    (tmp_path / "notes.txt").write_text("not a preference file")
    kept, rejected = read(tmp_path)
    assert [item.caption for item in kept] == ["picture 1", "picture 2"]
    assert [(Path(i.source).name, i.row, i.reason) for i in rejected] == [
        ("b.parquet", None, "column missing"),
        ("c.parquet", None, "file broken"),
    ]
    assert rejected[0].excerpt.startswith("no image_0 or jpg_0, image_1 or jpg_1, label_1; there are caption, label_0")


def test_a_file_damaged_within_keeps_what_came_before(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(64)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=32, compression="zstd")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(data)
    kept, rejected = read(tmp_path / "a.parquet")
    assert len(kept) == 32
    assert [item.reason for item in rejected] == ["file broken"]


@pytest.mark.parametrize("group_rows", [50, 5000])
def test_reading_holds_a_few_rows_however_the_file_is_grouped(tmp_path: Path, group_rows: int) -> None:
    images = [bytes(4000) + b"%d" % i for i in range(5000)]
    rows = [{"caption": "a", "jpg_0": x, "jpg_1": x, "label_0": 1.0, "label_1": 0.0} for x in images]  # 40 MB
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=group_rows, use_dictionary=False, compression="none")
    del rows, table
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in raw_rows("a.parquet", root=tmp_path)]
    assert len(held) == 5000
    assert max(held) < 16 * 2**20


@pytest.mark.parametrize("name", ["missing", "empty", "other.csv"])
def test_a_source_that_is_none_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"does not exist|holds no \.jsonl|unknown kind"):
        list(read_preferences(name, root=tmp_path))


def test_nothing_usable_is_an_error_that_tells_why(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [pair(label_0=3.0), pair(label_0=4.0), pair(caption="")])
    with pytest.raises(DataError, match=r"no usable preference pairs: label not in \[0, 1\] \(2\), empty \(1\); first"):
        list(read_preferences("a.parquet", root=tmp_path))
    write_parquet(tmp_path / "a.parquet", [{"caption": "a"}])
    with pytest.raises(DataError, match=r"column missing \(1\); first .*a\.parquet: column missing: 'no image_0"):
        list(read_preferences("a.parquet", root=tmp_path))


class TestHub:
    """The hub played by a file system in memory: the real one needs a network."""

    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        class Hub(MemoryFileSystem):
            store: ClassVar[dict[str, Any]] = {}
            pseudo_dirs: ClassVar[list[str]] = [""]

            def find(self, path: str, **options: Any) -> list[str]:
                if not self.exists(path):
                    raise FileNotFoundError(f"{path} (repository not found)")
                return [name.lstrip("/") for name in super().find(path, **options)]

        system = Hub(skip_instance_cache=True)
        monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: system)
        return system

    @staticmethod
    def put(hub: Any, path: str, rows: list[dict[str, Any]]) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        hub.pipe_file(path, buffer.getvalue())

    def test_only_files_of_the_split_are_read(self, hub: Any) -> None:
        for number, name in enumerate(["train-00000-of-2", "train-00001-of-2", "validation-0", "validation_unique-0"]):
            self.put(hub, f"datasets/org/set/data/{name}.parquet", [pair(number)])
        captions = [item.caption for item in read_preferences("hub:org/set") if isinstance(item, PreferencePair)]
        assert captions == ["picture 0", "picture 1"]
        (only,) = read_preferences("hub:org/set", split="validation")
        assert isinstance(only, PreferencePair)
        assert only.caption == "picture 2"

    def test_parquet_that_the_hub_made_is_read_where_the_set_has_none(self, hub: Any) -> None:
        hub.pipe_file("datasets/org/set/data.tar", b"")
        self.put(hub, "datasets/org/set@refs/convert/parquet/default/train/0000.parquet", [pair(5)])
        assert len(list(read_preferences("hub:org/set"))) == 1

    def test_an_unknown_split_is_an_error_that_names_files(self, hub: Any) -> None:
        self.put(hub, "datasets/org/set/data/test-0.parquet", [pair()])
        with pytest.raises(DataError, match=r"no parquet file of split 'train'; it has .*test-0\.parquet"):
            list(read_preferences("hub:org/set"))

    def test_an_absent_set_is_an_error_of_one_line(self, hub: Any) -> None:
        with pytest.raises(DataError, match=r"hub:org/none cannot be reached: .*or give a local folder"):
            list(read_preferences("hub:org/none"))

    def test_a_hub_that_falls_silent_is_an_error_and_no_rejected_row(self, hub: Any) -> None:
        self.put(hub, "datasets/org/set/data/train-0.parquet", [pair()])
        hub.open = lambda *_: (_ for _ in ()).throw(TimeoutError("no answer"))
        with pytest.raises(DataError, match="could not be read to its end: no answer; run again"):
            list(read_preferences("hub:org/set"))


def test_being_offline_is_an_error_of_one_line() -> None:
    code = (
        "from spo.data.preferences import read_preferences; from spo.errors import DataError\n"
        "try: list(read_preferences('hub:org/set'))\n"
        "except DataError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "hub:org/set cannot be reached" in done.stdout
    assert done.stdout.count("\n") == 1


def test_prepared_pairs_come_back_in_order_and_by_index(tmp_path: Path) -> None:
    pairs = prepared(tmp_path / "a.parquet", 150)
    assert list(read_pairs(tmp_path / "a.parquet")) == pairs
    found = PreferencePairs(tmp_path / "a.parquet")
    assert len(found) == 150
    assert [found[i] for i in (149, 0, 64, 63, 128)] == [pairs[i] for i in (149, 0, 64, 63, 128)]
    assert list(found.captions) == [item.caption for item in pairs]
    assert found.labels.tolist() == [[item.label_0, item.label_1] for item in pairs]
    for index in (-1, 150):
        with pytest.raises(IndexError, match="of 150"):
            found[index]


def test_row_groups_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    prepared(tmp_path / "a.parquet", 150)
    with PairWriter(tmp_path / "b.parquet") as writer:
        for i in range(8):
            writer.write(PreferencePair(f"{i}", b"x" * 2**20, b"y" * 2**20, 1.0, 0.0))
    rows = [
        [file.row_group(i).num_rows for i in range(file.num_row_groups)]
        for file in map(pq.read_metadata, (tmp_path / "a.parquet", tmp_path / "b.parquet"))
    ]
    assert rows == [[64, 64, 22], [2, 2, 2, 2]]


def test_a_prepared_file_has_the_layout_of_pick_a_pic_and_can_be_prepared_again(tmp_path: Path) -> None:
    pairs = prepared(tmp_path / "a.parquet", 5)
    assert pq.read_schema(tmp_path / "a.parquet").names == ["caption", "jpg_0", "jpg_1", "label_0", "label_1"]
    assert read(tmp_path / "a.parquet") == (pairs, [])


def test_no_pairs_are_an_empty_file(tmp_path: Path) -> None:
    prepared(tmp_path / "a.parquet", 0)
    assert list(read_pairs(tmp_path / "a.parquet")) == list(PreferencePairs(tmp_path / "a.parquet").captions) == []


def caption_of(pairs: PreferencePairs, index: int) -> str:
    return pairs[index].caption


def test_prepared_pairs_can_be_sent_to_worker_processes(tmp_path: Path) -> None:
    pairs = prepared(tmp_path / "a.parquet", 100)
    found = PreferencePairs(tmp_path / "a.parquet")
    assert pickle.loads(pickle.dumps(found))[70] == pairs[70]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(caption_of, (found, 69)) == pairs[69].caption


@pytest.mark.parametrize("broken", [None, b"no parquet"])
def test_a_prepared_file_that_is_none_is_an_error(tmp_path: Path, broken: bytes | None) -> None:
    if broken is not None:
        (tmp_path / "a.parquet").write_bytes(broken)
    with pytest.raises(DataError, match=r"is (missing|broken).*; run `python -m spo prepare`"):
        read_pairs(tmp_path / "a.parquet")


def test_a_prepared_file_of_other_columns_is_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"caption": "a"}])
    with pytest.raises(DataError, match=r"has columns \['caption'\]; it needs"):
        PreferencePairs(tmp_path / "a.parquet")
