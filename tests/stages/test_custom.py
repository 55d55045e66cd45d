"""A preference model that is a class of the user's own: in a project, from training to the comparison."""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spo.config import Config, ScoringConfig, load_config
from spo.core.types import LabelledPairs
from spo.errors import ConfigError, ModelError
from spo.models.load import build
from spo.runtime.files import read_json
from spo.stages import align, evaluate, prepare, train_preference
from spo.tracking import NullTracker
from spo.training.custom_preference import CustomPreference
from spo.training.preference_scorer import load_scorer
from spo.workspace import Workspace
from tests.test_pipeline import make_project

MODULE = """
from helper import channel

class Redness:
    def __init__(self, weight=1.0):
        self.weight = weight

    def __call__(self, images, prompts, t):
        assert len(prompts) == len(images) and 0 <= t <= 1000
        return self.weight * channel(images, 0)
"""
CUSTOM: dict[str, Any] = {"kind": "custom", "class": "my_module:Redness", "evaluate_timesteps": [0, 501]}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def change_profile(root: Path, model: dict[str, Any]) -> None:
    path = root / "configs" / "own.yaml"
    values = yaml.safe_load(path.read_text())
    values["preference_models"] = {"mine": model}
    values["align"]["spo"]["preference_model"] = "mine"
    path.write_text(yaml.safe_dump(values))


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    root = make_project(tmp_path / "project", "sd15")
    (root / "data" / "scorers").mkdir(parents=True)
    (root / "data" / "scorers" / "my_module.py").write_text(MODULE)
    (root / "data" / "scorers" / "helper.py").write_text("def channel(images, i): return images[:, i].mean(dim=(1, 2))")
    change_profile(root, {**CUSTOM, "options": {"weight": 2.0}})
    (root / "params.yaml").write_text("profile: own\nmethods: [spo]\ntrain_preference: [mine]\n")
    with contextlib.chdir(root):
        prepare.run(load_config(), tracker=NullTracker())
        yield load_config()


def test_the_stages_work_from_measuring_to_the_comparison(config: Config) -> None:
    train_preference.run(config, "mine", tracker=NullTracker())
    workspace = Workspace(config)
    metrics = read_json(workspace.train_preference("mine") / "metrics.json")
    assert metrics["steps"] == metrics["unet_forwards"] == metrics["skipped"] == 0
    rows = rows_of(workspace.train_preference("mine") / "accuracy.csv")
    assert [(row["timestep"], row["model"]) for row in rows] == [("0", "imported"), ("501", "imported")]

    (Path("data/scorers") / "my_module.py").unlink()  # the run keeps its own copy
    policy = align.build_policy(config, "spo")
    scorer = load_scorer(config, "mine", Path(), policy)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = scorer.score_images(images, ["a", "b", "c"], torch.tensor(1))
    torch.testing.assert_close(scores, 2 * images[:, 0].mean(dim=(1, 2)))

    align.run(config, "spo", 0, tracker=NullTracker())
    evaluate.run(config, tracker=NullTracker())
    assert {row["column"] for row in rows_of(workspace.evaluate / "comparisons.csv")} >= {"spo"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"class": "nosuch:Redness"},
            r"class='nosuch:Redness': there is no data/scorers/nosuch.py; put the module there",
        ),
        ({"class": "my_module:Blueness"}, "class='my_module:Blueness' cannot be made: AttributeError: .*Blueness"),
        ({"options": {"size": 1}}, "class='my_module:Redness' cannot be made: TypeError: .*size"),
    ],
)
def test_a_class_that_cannot_be_made_is_named(config: Config, model: dict[str, Any], message: str) -> None:
    change_profile(Path(), {**CUSTOM, **model})
    with pytest.raises(ModelError, match=message):
        train_preference.run(load_config(), "mine", tracker=NullTracker())
    assert not Workspace(config).preference_model("mine").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"class": "../elsewhere:Redness"}, "preference_models.mine.class"),
        ({"class": "Redness"}, "preference_models.mine.class"),
        ({"steps": 10}, "kind custom is not trained, so remove steps"),
        ({"labels": {"kind": "human"}}, "kind custom is not trained, so remove labels"),
    ],
)
def test_settings_that_a_class_has_no_use_for_are_refused(config: Config, model: dict[str, Any], message: str) -> None:
    change_profile(Path(), {**CUSTOM, **model})
    with pytest.raises(ConfigError, match=message):
        load_config()


def test_scores_of_another_shape_are_refused(config: Config) -> None:
    train_preference.run(config, "mine", tracker=NullTracker())
    scorer = load_scorer(config, "mine", Path(), align.build_policy(config, "spo"), ScoringConfig())
    scorer.reward = lambda images, prompts, t: images  # type: ignore[attr-defined]
    with pytest.raises(
        ModelError, match=r"the reward gave \(2, 3, 4, 4\) for 2 images; it should give a tensor \(2,\)"
    ):
        scorer.score_images(torch.rand(2, 3, 4, 4), ["a", "b"], torch.tensor(1))


@pytest.mark.parametrize("timestep", [0, 501])
def test_pairs_of_several_sizes_are_measured_together(config: Config, timestep: int) -> None:
    base = build(config.model, config.sampling, "cpu")
    training = CustomPreference.start(base, config, "mine")
    channels, height, width = base.latent_shape
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(6, channels, height, width, generator=generator)
    wide = torch.randn(6, channels, height, 2 * width, generator=generator)
    bucket, members = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]])
    label = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 3)
    pairs = LabelledPairs({0: square, 1: wide}, bucket, members, label, torch.ones(6), ["a"] * 6)
    accuracy, count = training.accuracy(pairs, timestep, seed=0)
    assert count == 6
    if timestep == 0:  # without noise the score is the mean of the red channel
        red = [base.decode(pairs.latents(torch.tensor([i]))[0])[:, 0].mean(dim=(1, 2)) for i in range(6)]
        right = [
            float((one > other) == (first == 1)) for (one, other), (first, _) in zip(red, label.tolist(), strict=True)
        ]
        assert accuracy == pytest.approx(sum(right) / 6)
