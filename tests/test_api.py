"""The names of `import spo`, and the example in its docstring."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import spo
from spo.preference.checkpoint import load_clip, save_preference_model
from spo.stages import prepare
from spo.tracking import NullTracker
from tests.test_pipeline import make_project


def test_every_name_is_there_and_documented() -> None:
    for name in spo.__all__:
        assert getattr(spo, name).__name__ == name
        assert name in spo.__doc__
        assert name in dir(spo)
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = spo.nosuch


def test_importing_the_package_loads_no_heavy_library() -> None:
    program = "import spo, sys; print(sorted({'torch', 'mlflow', 'pydantic', 'diffusers'} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_project(tmp_path / "project", "sd15")
    monkeypatch.chdir(root)
    config = spo.load_config()
    prepare.run(config, tracker=NullTracker())
    clip = load_clip(root / "clip")
    folder = spo.Workspace(config).preference_model("pixel")
    save_preference_model(clip.model, clip.tokenizer, clip.preprocess, folder)
    capsys.readouterr()
    example = textwrap.dedent(spo.__doc__[spo.__doc__.index("    import spo") :])
    exec(example, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == config.sampling.steps - 1
    assert all(line.startswith("t=") and " pairs, mean score " in line for line in lines)
