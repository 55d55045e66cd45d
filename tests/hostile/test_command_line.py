"""Whatever options a command gets, it ends with an exit code and one line: no traceback, and nothing is written."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spo.__main__ import main
from tests.hostile.trying import assert_one_line, tries

ROOT = Path(__file__).parents[2]
NUMBERS = ("nan", "inf", "-1", "0", "2", "1001", "1e9", "1000000000")
NAMES = ("base", "spo", "ddim", "tiny", "new.png", "new.safetensors", "params.yaml", "kohya", "merged", "a/b")
WORDS = st.sampled_from(("", " ", "x", "猫", "\udcff", ".", "..", "/", "-", "--", *NUMBERS, *NAMES))
OTHER = ("warning: ", "Usage: ", "Try ", "[transformers]")
OPTIONS = {
    "generate": ["--model", "--seed", "--num", "--out", "--sampler", "--steps", "--guidance", "--eta", "--profile"],
    "compare": ["--model", "--seed", "--num", "--out", "--sampler", "--steps", "--guidance", "--eta", "--profile"],
    "export": ["--format", "--out", "--method", "--checkpoint", "--profile"],
    "import-preference-model": ["--out", "--clip", "--processor", "--base"],
    "export-preference-model": ["--out"],
    "align": ["--seed", "--profile"],
    "train_preference": ["--profile"],
    "evaluate": ["--profile"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped configuration without data or models: no command gets to its work."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "params.yaml", folder)
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(sorted(OPTIONS)))
    options = draw(st.lists(st.tuples(st.sampled_from(OPTIONS[command]), WORDS), max_size=4))
    return [command, *draw(st.lists(WORDS, max_size=2)), *(word for option in options for word in option)]


@tries(150)
@given(line=command_lines())
@example(line=["generate", "a cat", "--num", "1000000000"])
@example(line=["generate", "a cat", "--guidance", "nan"])
@example(line=["export", "--format", "merged", "--out", "new", "--checkpoint", ""])
def test_any_options_end_in_one_line(project: Path, line: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as error:
        patch.chdir(project)
        for module in ("models", "stage"):
            patch.setattr(f"spo.commands.{module}.set_up_libraries", lambda: None)
        before = sorted(project.rglob("*"))
        code = main(line)
        assert sorted(project.rglob("*")) == before
    assert code in (1, 2)
    said = [text for text in error.getvalue().splitlines() if not text.startswith(OTHER)]
    assert_one_line(RuntimeError(said[-1]))
    assert said[-1].lower().startswith("error: ") or code == 2
    assert code == 2 or len(said) == 1
