"""The names of `import spo`, and the example in its docstring."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler

import spo
from spo.config import DiffusionDpoConfig, ModelConfig
from spo.errors import ConfigError
from spo.models.load import load_pipeline
from spo.preference.checkpoint import load_clip, save_preference_model
from spo.stages import prepare
from spo.tracking import NullTracker
from tests.models.tiny import RESOLUTION, make_tiny_pipeline
from tests.test_pipeline import make_project

ROOT = Path(__file__).parents[1]


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


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures become darker, and the LoRA that is written makes the same ones."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    example = text.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(example.replace("epochs=12", "epochs=6"), names)
    assert names["measured"]["updates"] == 18
    assert capsys.readouterr().out.startswith("18 updates in ")
    pipeline = names["pipeline"]
    trained = painted(pipeline)
    pipeline.unet.unload_lora()
    assert trained.mean() < painted(pipeline).mean() - 0.01
    pipeline.load_lora_weights("dark-lora/lora")
    torch.testing.assert_close(painted(pipeline), trained, atol=1e-4, rtol=0)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one round: its pictures change, and nothing else is claimed."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "align.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for source in code:
        exec(source.replace("epochs=12", "epochs=1"), names)
    assert names["measured"]["updates"] == 5
    assert names["sheet"].size == (520, 260)
    assert names["before"][0].tobytes() != names["after"][0].tobytes()


def painted(pipeline: Any) -> torch.Tensor:
    options = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "pt"}
    return pipeline(
        "a small blue circle on a white background", generator=torch.Generator().manual_seed(0), **options
    ).images


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_every_family_is_wrapped(family: str, tmp_path: Path) -> None:
    config = ModelConfig(family=family, path=str(make_tiny_pipeline(family, tmp_path / "model")), resolution=RESOLUTION)
    pipeline = load_pipeline(config, "cpu")
    scheduler = pipeline.scheduler = PNDMScheduler(steps_offset=1) if family == "sdxl" else pipeline.scheduler
    model = spo.wrap(pipeline, resolution=RESOLUTION, sampling=spo.SamplingConfig(steps=4))
    assert pipeline.scheduler is scheduler
    assert len(model.timesteps) == 4 and model.network.pipeline.vae is pipeline.vae


def test_settings_of_a_method_that_needs_pairs_are_refused_and_the_pipeline_stays_as_it_was(tmp_path: Path) -> None:
    path = make_tiny_pipeline("sd15", tmp_path / "model")
    pipeline = load_pipeline(ModelConfig(family="sd15", path=str(path), resolution=RESOLUTION), "cpu")
    settings: Any = DiffusionDpoConfig()
    with pytest.raises(ConfigError, match="learns from labelled pairs; give settings of SpoConfig, "):
        spo.align(pipeline, lambda *_: None, ["a"], tmp_path / "new", resolution=RESOLUTION, settings=settings)
    assert not getattr(pipeline.unet, "peft_config", None) and not (tmp_path / "new").exists()


def test_what_cannot_be_aligned_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the pipeline is a object; it should be one of StableDiffusionPipeline, "):
        spo.wrap(object(), resolution=64)
    with pytest.raises(ConfigError, match="exists; name a folder that does not"):
        spo.align(None, None, ["a"], tmp_path, resolution=64)
    with pytest.raises(ConfigError, match="prompts is empty"):
        spo.align(None, None, [], tmp_path / "new", resolution=64)
