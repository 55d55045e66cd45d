"""label and study from the command line: what is wrong is told in one line, and nothing is written."""

import shutil
import socket
from pathlib import Path

import pytest

from spo.__main__ import main
from spo.config import load_config
from spo.data.preferences import PreferencePair, read_preferences
from spo.people import server
from spo.people.desk import Desk
from spo.runtime.locking import locked
from spo.workspace import Workspace

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped configuration and prompts, and no models."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "data").mkdir()
    shutil.copytree(ROOT / "data" / "prompts", tmp_path / "data" / "prompts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


LABEL = ["label", "mine", "--port", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["label", "a/b"], "NAME 'a/b' cannot be a folder's name"),
        (["label", ".."], "NAME '..' cannot be a folder's name"),
        (["label", ""], "NAME '' cannot be a folder's name"),
        ([*LABEL, "--profile", "nosuch"], "profile 'nosuch' has no"),
        ([*LABEL, "--num", "0"], "--num 0 makes no pair; use 1 or more"),
        ([*LABEL, "--model", "nosuch"], "--model 'nosuch' names nothing here"),
        ([*LABEL, "--sampler", "nosuch"], "--sampler 'nosuch' is not in evaluate.samplers"),
        ([*LABEL, "--pairs", "nowhere"], "preference source nowhere does not exist"),
        ([*LABEL, "--pairs", "x", "--model", "spo"], "--pairs shows existing pictures; leave out --model"),
        ([*LABEL, "--pairs", "data/preferences/mine"], "is the folder of mine itself; use another NAME"),
        (LABEL, "data/base/tiny"),  # the model is missing
        ([*LABEL, "--host", "192.0.2.1"], "cannot listen on 192.0.2.1 port 0"),
        (["study", "a/b"], "NAME 'a/b' cannot be a folder's name"),
        (["study", "--num-prompts", "0"], "--num-prompts 0 shows nothing; use 1 or more"),
        (["study"], "runs/tiny/evaluate/scores.csv is missing; run `python -m spo evaluate` first"),
        (["study", "--results"], "scores.csv is missing"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ") and message in lines[0]
    assert not (project / "data" / "preferences").exists() and not (project / "data" / "studies").exists()


def test_a_port_in_use_is_told_before_a_model_is_loaded(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        assert main(["label", "mine", "--port", str(number)]) == 1
    assert capsys.readouterr().err == (
        f"error: cannot listen on 127.0.0.1 port {number}: Address already in use; use another --port or --host\n"
    )


def test_a_folder_of_other_pairs_is_not_touched(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = project / "data" / "preferences" / "tiny"
    folder.mkdir(parents=True)
    (folder / "pairs.parquet").touch()
    assert main(["label", "tiny", "--port", "0"]) == 1
    assert "data/preferences/tiny exists, but `python -m spo label` did not make it" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["pairs.parquet"]


@pytest.mark.parametrize("command", ["label", "study"])
def test_a_second_server_of_the_same_folder_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with locked(Workspace(load_config()).shared_lock(command, "mine"), f"{command} mine"):
        assert main([command, "mine", "--port", "0", "--profile", "tiny-flow"]) == 1
    assert f"error: {command} mine is running already: process" in capsys.readouterr().err


def test_existing_pairs_are_labelled_anew_and_the_command_says_how_to_train_on_them(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ROOT / "data" / "preferences" / "tiny"

    def serve(desk: Desk, place: server.Place, **_: str) -> None:
        desk.pool.join()
        while turn := desk.state("anna")["turn"]:
            desk.choose("anna", turn, "tie")

    monkeypatch.setattr(server, "serve", serve)
    assert main(["label", "mine", "--pairs", str(source), "--num", "3", "--port", "0"]) == 0
    given = [pair for pair, _ in zip(read_preferences(str(source)), range(3), strict=False)]
    made = list(read_preferences("data/preferences/mine"))
    assert all(isinstance(pair, PreferencePair) and pair.is_tie for pair in made)
    assert [(pair.caption, pair.image_0, pair.image_1) for pair in made] == [
        (pair.caption, pair.image_0, pair.image_1) for pair in given
    ]
    assert capsys.readouterr().out.splitlines() == [
        "3 choices by anna in data/preferences/mine",
        "to train on them, set prepare.preferences.source: data/preferences/mine in configs/tiny.yaml and run "
        "`dvc repro`",
    ]
