"""The stage that trains the preference model, where there is one already."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spo.config import Config, load_config
from spo.preference.checkpoint import load_clip, load_preference_model, save_preference_model
from spo.report.inputs import read_csv
from spo.runtime.saver import Saver
from spo.stages import prepare, train_preference
from spo.tracking import NullTracker
from spo.training.preference import LabelledPairs, StepAwareTraining
from spo.workspace import Workspace
from spo.world.pretraining.clip import new_clip, new_tokenizer, save_clip
from tests.models.tiny import RESOLUTION, make_tiny_pipeline
from tests.test_pipeline import make_project


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A profile with a trained preference model and no pairs."""
    make_tiny_pipeline("sd15", tmp_path / "model")
    tokenizer = new_tokenizer()
    save_clip(new_clip(tokenizer), tokenizer, tmp_path / "clip")
    trained = load_clip(tmp_path / "clip")
    with torch.no_grad():
        trained.model.final_modulation.bias.add_(0.1)
    save_preference_model(trained.model, trained.tokenizer, trained.preprocess, tmp_path / "trained")
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(20)))
    return Config.model_validate(
        {
            "profile": "own",
            "model": {"family": "sd15", "path": str(tmp_path / "model"), "resolution": RESOLUTION},
            "sampling": {"steps": 5},
            "prepare": {"prompts": {"source": "prompts.txt"}},
            "preference_models": {"pixel": {"start_from": "-", "checkpoint": str(tmp_path / "trained")}},
            "align": {"spo": {"method": "spo", "first_step": 1}},
            "evaluate": {
                "num_prompts": 2,
                "num_validation_prompts": 2,
                "metrics": [{"kind": "oracle"}],
                "primary": "aesthetic",
            },
        }
    )


def test_a_named_model_is_taken_over_without_pairs(config: Config, tmp_path: Path) -> None:
    prepare.run(config, root=tmp_path, tracker=NullTracker())
    train_preference.run(config, "pixel", root=tmp_path, tracker=NullTracker())
    folder, made = tmp_path / "runs/own/train_preference/pixel", Workspace(config, tmp_path).preference_model("pixel")
    given, taken = (load_preference_model(path).model.state_dict() for path in (tmp_path / "trained", made))
    assert all(torch.equal(given[name], taken[name]) for name in given)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["accuracy"], metrics["pairs"], metrics["steps"]) == ({}, 0, 0)
    assert read_csv(folder / "accuracy.csv", "train_preference", ("timestep",)) == []


def test_the_seconds_before_and_after_a_saved_state_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_project(tmp_path / "project", "sd15"))
    config, clock = load_config(), SimpleNamespace(now=0.0)
    prepare.run(config, tracker=NullTracker())
    monkeypatch.setattr(train_preference, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(Saver, "save_if_due", Saver.save)
    step = StepAwareTraining.step

    def ten_seconds(
        self: StepAwareTraining, pairs: LabelledPairs, number: int, *, seed: int
    ) -> dict[str, float] | None:
        if number == stop_before:
            raise KeyboardInterrupt
        clock.now += 10
        return step(self, pairs, number, seed=seed)

    monkeypatch.setattr(StepAwareTraining, "step", ten_seconds)
    stop_before = 2
    with pytest.raises(KeyboardInterrupt):
        train_preference.run(config, "pixel", tracker=NullTracker())
    clock.now, stop_before = 1000.0, -1  # another process, later
    train_preference.run(config, "pixel", tracker=NullTracker())
    metrics = json.loads((Workspace(config).train_preference("pixel") / "metrics.json").read_text())
    assert (metrics["steps"], metrics["seconds"]) == (3, 30.0)
