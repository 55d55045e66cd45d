"""The stages with a preference model that reads latents."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spo.config import Config, LateConfig, PixelPreferenceConfig, ScoringConfig, load_config
from spo.core.noise import KeyedNoise
from spo.core.rollout import rollout
from spo.errors import ConfigError, ModelError
from spo.preference.latent_checkpoint import LatentPreference
from spo.preference.latent_published import write_published_latent
from spo.preference.latent_score import LatentScorer
from spo.runtime.saver import Saver
from spo.stages import align, evaluate, prepare, train_preference
from spo.tracking import NullTracker
from spo.training.latent_preference import LatentPreferenceTraining
from spo.training.preference_scorer import load_scorer
from spo.workspace import Workspace
from tests.models.tiny import DIFFUSION, make_tiny_pipeline
from tests.test_pipeline import make_project

PREFERENCE = {
    "kind": "latent", "steps": 4, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 1e-3, "warmup_steps": 1,
    "evaluate_timesteps": [0, 501],
}  # fmt: skip


def change_profile(root: Path, **sections: Any) -> None:
    path = root / "configs" / "own.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))


@pytest.fixture(scope="module", params=[*DIFFUSION, "sd3"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared, and with a trained preference model."""
    root = make_project(tmp_path_factory.mktemp("latent") / "project", request.param)
    watch = {"every": 1, "num_prompts": 2, "metric": {"kind": "oracle"}, "score": "aesthetic"}
    method = {"method": "spo", "epochs": 1, "prompts_per_rollout": 6, "candidates": 3, "first_step": 0, "beta": 500.0}
    method |= {"threshold": {"low": 0.0, "high": 0.01}, "scoring": {"at_step_time": True}, "watch": watch}
    method |= {"preference_model": "latent"}
    method |= {"checkpoints": 1, "batch_size": 8}
    change_profile(root, preference_models={"latent": PREFERENCE}, align={"spo": method})
    (root / "params.yaml").write_text("profile: own\nmethods: [spo]\ntrain_preference: [latent]\n")
    with contextlib.chdir(root):
        prepare.run(load_config(), tracker=NullTracker())
        train_preference.run(load_config(), "latent", tracker=NullTracker())
    return root


@pytest.fixture
def config(project: Path) -> Iterator[Config]:
    with contextlib.chdir(project):
        yield load_config()


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_the_stages_work_from_training_to_the_comparison(config: Config) -> None:
    workspace = Workspace(config)
    trained = metrics(workspace.train_preference("latent"))
    assert trained["unet_forwards"] == 4 * 4 * 2  # steps, pairs, images; two halves of a UNet each
    assert set(trained["accuracy"]["trained"]) == {"t_0", "t_501"}
    align.run(config, "spo", 0, tracker=NullTracker())
    cost = metrics(workspace.aligned("spo", 0))
    assert cost["vae_decodes"] == 0 and cost["num_examples"] > 0
    assert (workspace.aligned("spo", 0) / "watch.csv").is_file()
    evaluate.run(config, tracker=NullTracker())
    assert {"base", "spo"} <= set(metrics(workspace.evaluate))


@pytest.mark.slow
def test_a_step_costs_one_pass_of_the_policy_and_half_passes_of_the_model(config: Config) -> None:
    policy = align.build_policy(config, "spo")
    scorer, prompts, k = load_scorer(config, "latent", Path(), policy), ["a cat", "a dog"], 3
    noise = KeyedNoise(0, 0, range(2))
    segments = list(
        rollout(policy, scorer, policy.encode(prompts), scorer.encode(prompts), candidates=k, first_step=0,
                branch_steps=1, noise=noise)
    )  # fmt: skip
    assert sum(segment.unet_forwards for segment in segments) == len(prompts) * policy.num_trainable
    assert policy.network.forwards == policy.num_trainable * len(prompts) * (2 + k * 2 / 2)
    assert policy.autoencoder.decodes == 0


@pytest.mark.slow
def test_a_pixel_model_may_score_the_last_steps(project: Path, config: Config, tmp_path: Path) -> None:
    pixel = {"start_from": "clip", "steps": 1, "batch_size": 4, "evaluate_timesteps": [501]}
    models = {**config.preference_models, "pixel": PixelPreferenceConfig(**pixel)}
    late = LateConfig(preference_model="pixel", at_most=500)
    changes = {"late": late, "scoring": ScoringConfig(), "threshold": 0.0}
    both = {"late": config.align["spo"].model_copy(update=changes)}
    config = config.model_copy(update={"preference_models": models, "align": {**config.align, **both}})
    train_preference.run(config, "pixel", tracker=NullTracker())
    align.run(config, "late", 0, tracker=NullTracker())
    workspace = Workspace(config)
    cost, policy = metrics(workspace.aligned("late", 0)), align.build_policy(config, "late")
    scored_at = [*policy.timesteps.tolist(), 0][1 : policy.num_trainable + 1]
    late_steps = sum(t <= 500 for t in scored_at)
    prompts = len(workspace.prepared.prompts("train"))
    assert 0 < late_steps < len(scored_at)
    assert cost["vae_decodes"] == prompts * 3 * late_steps  # candidates of the last steps alone
    inputs = align.state_store(config, "late", 0, Path()).made_by["inputs"]
    assert {"preference_model", "late_preference_model"} <= set(inputs)


@pytest.mark.slow
def test_clean_images_are_scored_as_their_latents(config: Config) -> None:
    policy = align.build_policy(config, "spo")
    scorer = load_scorer(config, "latent", Path(), policy)
    assert isinstance(scorer, LatentScorer)
    images, text = torch.rand(2, 3, 16, 16), scorer.encode(["a cat", "a dog"])
    scores = scorer.score_images(images, text, torch.zeros((), dtype=torch.long))
    expected = scorer.score_latents(policy.autoencoder.encode(images), torch.zeros(2, dtype=torch.long), text)
    assert torch.equal(scores, expected)
    assert policy.network.forwards == 0  # a look from outside costs the training nothing
    with pytest.raises(ConfigError, match=r"timestep=0 needs a preference model of kind pixel"):
        load_scorer(config, "latent", Path(), policy, ScoringConfig(timestep=0))


@pytest.mark.slow
def test_a_stopped_training_goes_on_as_if_it_had_not(
    project: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(config)
    model = workspace.preference_model("latent") / "model.safetensors"
    whole, table = load_file(model), metrics(workspace.train_preference("latent"))
    monkeypatch.setattr(Saver, "save_if_due", Saver.save)
    step = LatentPreferenceTraining.step

    def stopped(self: LatentPreferenceTraining, pairs: Any, number: int, *, seed: int) -> Any:
        if number == stop_before:
            raise KeyboardInterrupt
        return step(self, pairs, number, seed=seed)

    monkeypatch.setattr(LatentPreferenceTraining, "step", stopped)
    stop_before = 2
    with pytest.raises(KeyboardInterrupt):
        train_preference.run(config, "latent", tracker=NullTracker())
    stop_before = -1
    train_preference.run(config, "latent", tracker=NullTracker())
    again = load_file(model)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert {**metrics(workspace.train_preference("latent")), "seconds": 0} == {**table, "seconds": 0}


@pytest.mark.slow
def test_a_checkpoint_of_either_layout_is_taken_over(project: Path, config: Config, tmp_path: Path) -> None:
    policy = align.build_policy(config, "spo")
    scorer = load_scorer(config, "latent", Path(), policy)
    assert isinstance(scorer, LatentScorer)
    layouts = [{"checkpoint": str(Workspace(config).preference_model("latent"))}]
    if isinstance(scorer.preference, LatentPreference):  # there is no published layout for transformers
        write_published_latent(scorer.preference, tmp_path / "published")
        layouts.append({"checkpoint": str(tmp_path / "published"), "checkpoint_base": "model"})
    for given in layouts:
        values = {**config.model_dump(), "preference_models": {"latent": {"kind": "latent", **given}}}
        other = Config.model_validate(values)
        taken = train_preference.TRAININGS["latent"].start(policy, other, "latent").model.state_dict()
        assert all(torch.equal(taken[name], tensor) for name, tensor in scorer.model.state_dict().items())


@pytest.mark.slow
def test_a_model_of_the_other_kind_is_refused(config: Config) -> None:
    values = config.model_dump() | {"preference_models": {"latent": {"start_from": "clip"}}}
    pixel = Config.model_validate(
        values | {"align": {"spo": {"method": "spo", "preference_model": "latent", "first_step": 1}}}
    )
    with pytest.raises(ModelError, match="of kind 'latent', not 'pixel'"):
        load_scorer(pixel, "latent", Path(), align.build_policy(pixel, "spo"))


@pytest.mark.slow
def test_a_policy_with_another_autoencoder_is_refused_in_one_line(config: Config, tmp_path: Path) -> None:
    other = make_tiny_pipeline("sd15", tmp_path / "other", seed=9)
    changed = config.model_copy(update={"model": config.model.model_copy(update={"vae": str(other / "vae")})})
    with pytest.raises(ModelError, match="reads the latents of another autoencoder than the policy's") as refused:
        align.run(changed, "spo", 1, tracker=NullTracker())
    assert "\n" not in str(refused.value)
