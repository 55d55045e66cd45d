import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spo.config import Config, EvaluateConfig, ModelConfig, PrepareConfig
from spo.data.preferences import PairWriter, PreferencePair, read_pairs
from spo.errors import DataError
from spo.stages.prepare import run
from spo.tracking import NullTracker

OUTPUTS = {
    "prompts/train.txt",
    "prompts/validation.txt",
    "prompts/test.txt",
    "preferences/train.parquet",
    "preferences/validation.parquet",
    "rejected.jsonl",
    "metrics.json",
}


def make_config(**changes: Any) -> Config:
    """A configuration of which only what this stage reads is filled."""
    prepare = {
        "prompts": {"source": "prompts.txt"},
        "preferences": {"source": "pairs.parquet"},
        "validation_fraction": 0.1,
        "test_fraction": 0.2,
    }
    model = ModelConfig(family="sd15", path="model", resolution=64)
    evaluate = EvaluateConfig.model_construct(num_prompts=20, num_validation_prompts=10)
    sections = {"model": model, "prepare": PrepareConfig.model_validate(prepare | changes), "evaluate": evaluate}
    return Config.model_construct(profile="small", seed=0, **sections)


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_sources(root: Path) -> None:
    """100 prompts and a duplicate; 240 pairs of 120 captions, 20 of which are no prompts, 12 ties and 2 bad rows."""
    (root / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(100)) + "prompt  0\n\n")
    rows = [
        {
            "caption": f"prompt {i % 120}",
            "jpg_0": picture(i),
            "jpg_1": picture(i + 1),
            "label_0": 0.5 if i < 12 else 1.0,
            "label_1": 0.5 if i < 12 else 0.0,
        }
        for i in range(240)
    ]
    rows += [rows[0] | {"jpg_0": b"no picture"}, rows[0] | {"label_0": 1.0}]
    pq.write_table(pa.Table.from_pylist(rows), root / "pairs.parquet")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_sources(tmp_path)
    return tmp_path


def lines(folder: Path, side: str) -> list[str]:
    return (folder / f"prompts/{side}.txt").read_text().splitlines()


def test_prepare_writes_its_outputs_and_nothing_else(project: Path) -> None:
    metrics = run(make_config(), root=project, tracker=NullTracker())
    folder = project / "runs/small/prepare"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == OUTPUTS
    assert [path.name for path in folder.parent.iterdir()] == ["prepare"]
    assert json.loads((folder / "metrics.json").read_text()) == metrics


def test_metrics_count_every_row(project: Path) -> None:
    metrics = run(make_config(), root=project, tracker=NullTracker())
    assert metrics["prompts"] == {
        "read": 102,
        "kept": 100,
        "duplicates": 1,
        "rejected": {"duplicate": 1, "empty": 1},
        "train": 70,
        "validation": 10,
        "test": 20,
        "cut": {},
    }
    preferences = metrics["preferences"]
    assert preferences["train"] + preferences["validation"] == preferences["kept"] == 240
    assert preferences["rejected"] == {"image broken": 1, "labels do not sum to 1": 1}
    assert (preferences["read"], preferences["ties"], preferences["captions"]) == (242, 12, 120)


def test_fewer_prompts_than_evaluation_asks_for_are_a_warning(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    for num_prompts, warned in ((20, False), (21, True)):
        evaluate = config.evaluate.model_copy(update={"num_prompts": num_prompts})
        run(config.model_copy(update={"evaluate": evaluate}), root=project, tracker=NullTracker())
        told = "warning: evaluate.num_prompts: only 20 of 100 prompts are test prompts, fewer than the 21 asked"
        assert (told in capsys.readouterr().err) == warned


def test_prompts_longer_than_the_text_encoders_context_are_counted_with_examples(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.models.tiny import TOKENS, make_tokenizer  # slow to import

    monkeypatch.chdir(project)
    run(make_config(), root=project, tracker=NullTracker())
    said = capsys.readouterr().err
    assert "warning: it is not known which prompts are too long: model is no folder" in said
    make_tokenizer().save_pretrained(project / "model" / "tokenizer")
    long = "x" * (TOKENS - 1)  # a token a letter, and the two marks
    with (project / "prompts.txt").open("a") as file:
        file.write(f"{'y' * (TOKENS - 2)}\n{long}\n")
    metrics = run(make_config(), root=project, tracker=NullTracker())
    assert metrics["prompts"]["cut"] == {"tokenizer": {"context": TOKENS, "prompts": 1, "examples": [long]}}
    assert (
        f"1 of 102 prompts are longer than the {TOKENS} tokens of the tokenizer and are cut" in capsys.readouterr().err
    )


def test_rejected_rows_are_listed_with_source_row_and_reason(project: Path) -> None:
    run(make_config(), root=project, tracker=NullTracker())
    rejected = [json.loads(line) for line in (project / "runs/small/prepare/rejected.jsonl").read_text().splitlines()]
    assert [(Path(item["source"]).name, item["row"], item["reason"]) for item in rejected] == [
        ("prompts.txt", 101, "duplicate"),
        ("prompts.txt", 102, "empty"),
        ("pairs.parquet", 241, "image broken"),
        ("pairs.parquet", 242, "labels do not sum to 1"),
    ]


def test_no_prompt_is_on_two_sides(project: Path) -> None:
    run(make_config(), root=project, tracker=NullTracker())
    folder = project / "runs/small/prepare"
    train, validation, test = (set(lines(folder, side)) for side in ("train", "validation", "test"))
    to_train, to_validation = (
        {pair.caption for pair in read_pairs(folder / f"preferences/{side}.parquet")}
        for side in ("train", "validation")
    )
    assert train | validation | test == {f"prompt {i}" for i in range(100)}
    assert len(train) + len(validation) + len(test) == 100
    assert not to_train & to_validation
    assert validation | test <= to_validation
    assert train <= to_train
    assert len(to_train | to_validation) == 120


def test_a_caption_in_capitals_is_on_the_side_of_its_prompt(project: Path) -> None:
    run(make_config(), root=project, tracker=NullTracker())
    folder = project / "runs/small/prepare"
    held = set(lines(folder, "validation") + lines(folder, "test"))
    with PairWriter(project / "pairs.parquet") as writer:
        for i in range(100):
            writer.write(PreferencePair(f"Prompt {i}", picture(i), picture(i + 1), 1.0, 0.0))
    run(make_config(), root=project, tracker=NullTracker())
    pairs = read_pairs(folder / "preferences/validation.parquet")
    assert {pair.caption.lower() for pair in pairs} == held


def test_captions_that_are_no_prompts_are_split_by_hash(project: Path) -> None:
    (project / "prompts.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    metrics = run(make_config(validation_fraction=0.3), root=project, tracker=NullTracker())["preferences"]
    assert 0.15 < metrics["validation"] / metrics["kept"] < 0.45


def test_preparing_again_gives_the_same_bytes_and_counts(project: Path) -> None:
    folder = project / "runs/small/prepare"
    contents = []
    for _ in range(2):
        metrics = run(make_config(), root=project, tracker=NullTracker())
        contents.append({name: (folder / name).read_bytes() for name in OUTPUTS - {"metrics.json"}})
        contents[-1]["counts"] = {name: metrics[name] for name in ("prompts", "preferences")}
    assert contents[0] == contents[1]


def test_pairs_keep_their_images_labels_and_order(project: Path) -> None:
    run(make_config(), root=project, tracker=NullTracker())
    sources = list(read_pairs(project / "pairs.parquet"))[:240]
    for side in ("train", "validation"):
        pairs = list(read_pairs(project / f"runs/small/prepare/preferences/{side}.parquet"))
        captions = {pair.caption for pair in pairs}
        assert pairs == [pair for pair in sources if pair.caption in captions]


def test_limits_are_kept(project: Path) -> None:
    prepare = {
        "prompts": {"source": "prompts.txt", "max_prompts": 50},
        "preferences": {"source": "pairs.parquet", "max_pairs": 100},
    }
    metrics = run(make_config(**prepare), root=project, tracker=NullTracker())
    assert (metrics["prompts"]["kept"], metrics["preferences"]["kept"]) == (50, 100)


def test_without_pairs_their_folder_is_empty(project: Path) -> None:
    metrics = run(make_config(preferences=None), root=project, tracker=NullTracker())
    folder = project / "runs/small/prepare"
    assert list((folder / "preferences").iterdir()) == []
    assert metrics["preferences"] == {"read": 0, "kept": 0}
    assert len(lines(folder, "train")) == 70


def test_a_failure_leaves_the_former_outputs_whole(project: Path) -> None:
    run(make_config(), root=project, tracker=NullTracker())
    folder = project / "runs/small/prepare"
    before = {name: (folder / name).read_bytes() for name in OUTPUTS}
    (project / "pairs.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="no usable preference pairs: file broken"):
        run(make_config(), root=project, tracker=NullTracker())
    assert {name: (folder / name).read_bytes() for name in OUTPUTS} == before
    assert [path.name for path in folder.parent.iterdir()] == ["prepare"]


def test_pairs_that_all_fall_to_one_side_are_an_error(project: Path) -> None:
    (project / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(10)))
    run(make_config(), root=project, tracker=NullTracker())
    train = lines(project / "runs/small/prepare", "train")
    with PairWriter(project / "pairs.parquet") as writer:
        writer.write(PreferencePair(train[0], picture(0), picture(1), 1.0, 0.0))
    with pytest.raises(DataError, match="with 1 captions none falls to validation; give pairs of more captions"):
        run(make_config(), root=project, tracker=NullTracker())


def test_too_few_prompts_are_an_error(project: Path) -> None:
    (project / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="2 prompts cannot be split"):
        run(make_config(), root=project, tracker=NullTracker())


PEAK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_prepare import make_config
from spo.stages.prepare import run
from spo.tracking import NullTracker
run(make_config(), root=Path(sys.argv[1]), tracker=NullTracker())
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) / 1024)  # getrusage would count the parent of before exec
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_stays_flat_over_ten_times_the_pairs(tmp_path: Path) -> None:
    """More pairs by far more than the megabytes that memory may grow by."""
    few, many, size, most = (5_000, 50_000, 3_000, 60) if os.environ.get("SPO_SOAK") else (200, 2_000, 30_000, 30)
    filler = bytes(size)  # after the end of a PNG: read as the picture, and as large as a real one
    assert (many - few) * 2 * size > 3 * most * 1e6
    peaks = {}
    for count in (few, many):
        root = tmp_path / str(count)
        root.mkdir()
        (root / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(1000)))
        with PairWriter(root / "pairs.parquet") as writer:
            for i in range(count):
                image = picture(i) + filler
                writer.write(PreferencePair(f"prompt {i % 20_000}", image, image, 1.0, 0.0))
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(root), str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[count] = float(done.stdout)
    print(f"peak resident memory in MB by pairs: {peaks}")
    assert peaks[many] - peaks[few] < most
