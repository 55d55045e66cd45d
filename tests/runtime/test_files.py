from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spo.runtime import files
from spo.runtime.files import atomic_path, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_only_when_the_block_succeeds(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
        assert temporary.suffix == ".txt"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_write_leaves_the_old_and_no_half(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    inner = target / "x" if kind == "folder" else target
    write_text(inner, "old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_path(target) as temporary:
        write_text(temporary / "x" if kind == "folder" else temporary, "half")
        raise RuntimeError("halfway")
    assert inner.read_text() == "old"
    assert names(tmp_path) == ["target"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "folder" / "stale", "")
    with atomic_path(tmp_path / "folder") as temporary:
        write_text(temporary / "fresh", "")
    assert names(tmp_path / "folder") == ["fresh"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("becomes", ["file", "folder"])
def test_a_file_and_a_folder_replace_each_other(tmp_path: Path, becomes: str) -> None:
    write_text(tmp_path / "a" / "x" if becomes == "file" else tmp_path / "a", "")
    with atomic_path(tmp_path / "a") as temporary:
        write_text(temporary if becomes == "file" else temporary / "x", "")
    assert (tmp_path / "a").is_file() == (becomes == "file")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_weights_get_the_umask_s_mode(tmp_path: Path, name: str) -> None:
    """So that a container's user can read what another user wrote."""
    with atomic_path(tmp_path / name) as temporary:
        file = temporary if temporary.suffix == ".safetensors" else temporary / "b.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file({"w": torch.ones(1)}, file)
        assert file.stat().st_mode & 0o777 == 0o600
    (tmp_path / "plain").touch()
    written = next((tmp_path / name).rglob("*.safetensors"), tmp_path / name)
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_empty_block_is_an_error_and_keeps_the_old(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_path(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "old"


def test_json_keeps_order_and_letters_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1.5, "a": "\N{LATIN SMALL LETTER U WITH DIAERESIS}"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": 1.5,\n  "a": "\u00fc"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert (tmp_path / "a.json").read_text(encoding="utf-8").startswith('{\n  "b"')


def killed_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has left counts from now on as that of one that was killed."""
    monkeypatch.setattr(files, "_lives", lambda pid: False)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(files._beside(tmp_path / "a.txt", "tmp", ".txt"), "half")
    write_text(files._beside(tmp_path / "other.txt", "tmp", ".txt"), "another's")
    killed_process(monkeypatch)
    write_text(tmp_path / "a.txt", "new")
    assert len(names(tmp_path)) == 2
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_folder_caught_between_its_two_renames_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(files._beside(tmp_path / "a", "old", "") / "x", "old")
    killed_process(monkeypatch)
    with pytest.raises(RuntimeError, match="halfway"), files.atomic_path(tmp_path / "a"):
        raise RuntimeError("halfway")
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(files._beside(tmp_path / "a", "tmp", ""), "half")
    monkeypatch.setattr(files, "_lives", lambda pid: True)
    write_text(tmp_path / "b", "")
    assert len(names(tmp_path)) == 2
