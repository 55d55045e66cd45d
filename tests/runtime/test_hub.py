"""Where the hub cannot be reached: no waiting, no noise, one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from spo.runtime import hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the client knows."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._answers.cache_clear()


def answer(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[str]:
    """Let the hub answer, or fail; the addresses asked."""
    asked: list[str] = []

    class Session:
        def head(self, address: str, **_: Any) -> None:
            asked.append(address)
            if error:
                raise error

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    return asked


@pytest.mark.usefixtures("online")
def test_a_hub_that_answers_is_asked_once_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch)
    assert hub.connect()
    assert hub.connect()
    assert asked == [constants.ENDPOINT]
    assert not constants.HF_HUB_OFFLINE
    assert "the hub does not give it: gated" in hub.unavailable("a/b", "model.path", OSError("gated"))


@pytest.mark.usefixtures("online")
def test_without_an_answer_only_the_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, OSError("no network"))
    assert not hub.connect()
    assert constants.HF_HUB_OFFLINE
    said = hub.unavailable("a/b", "model.path", OSError("x\ny"))
    assert "the hub cannot be reached" in said
    assert "run `hf download a/b --local-dir models/b`, bring the folder here and name it in model.path" in said
    said = hub.unavailable("a/b", "model.path", OSError(), hub.only("*.json", "c/*", but=["d/*"]))
    assert 'models/b --include "*.json" --include "c/*" --exclude "d/*"`, bring the folder' in said


@pytest.mark.parametrize(
    ("source", "is_name"),
    [
        ("./folder", False),
        ("owner/name", True),
        ("stable-diffusion-v1-5/stable-diffusion-v1.5", True),
        ("name", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("loras/mine.safetensors", False),
    ],
)
def test_names_of_the_hub(source: str, is_name: bool) -> None:
    assert hub.is_name(source) == is_name


def test_a_folder_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not hub.is_name("owner/name")


def test_a_dead_hub_ends_a_load_at_once_with_one_line_and_no_other(tmp_path: Path) -> None:
    code = (
        "from spo.config import ModelConfig; from spo.errors import ModelError\n"
        "from spo.models.load import load_pipeline\n"
        "try: load_pipeline(ModelConfig(family='sd15', path='a/b', resolution=64), 'cpu')\n"
        "except ModelError as error: print(error)"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.count("\n") == 1
    assert "model.path='a/b' is no folder here, nor in the hub's cache, and the hub cannot be reached" in done.stdout
    assert "Retrying" not in done.stderr
    assert "Traceback" not in done.stderr
