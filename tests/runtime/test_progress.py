from pathlib import Path

import pytest

from spo.runtime import progress as module
from spo.runtime.progress import progress


def test_iterating_yields_everything_and_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(iter("abc"), label="letters")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("letters: 3 in ")
    assert captured.err.count("\n") == 1


def test_a_large_model_is_named_while_it_loads_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "missing"]
    for file in files[:2]:
        file.write_bytes(b"12345")
    for large, rank, told in ((10, "0", "loading the model\n"), (11, "0", ""), (10, "1", "")):
        monkeypatch.setattr(module, "LARGE", large)
        monkeypatch.setenv("RANK", rank)
        module.tell_loading("the model", files)
        assert capsys.readouterr().err == told


def test_updates_count_where_nothing_is_iterated(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=5, label="train") as bar:
        for _ in range(3):
            bar.update(loss=0.123456)
    assert "train: 3/5 in " in (shown := capsys.readouterr().err)
    assert "loss=0.1235" in shown


def test_updates_of_an_iterated_progress_show_values_only(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress(range(4), label="epochs")
    for _ in bar:
        bar.update(kept=7)
    assert "epochs: 4/4 in " in (shown := capsys.readouterr().err)
    assert shown.rstrip().endswith("kept=7")


def test_lines_in_between_tell_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    list(progress(range(2), label="x"))
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("x: 1/2, ")
    assert first.endswith(" left")


def test_an_empty_iterable_is_nothing_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([], label="x")) == []
    assert "x: 0" in capsys.readouterr().err
