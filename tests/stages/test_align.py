"""Every method as a stage: from prepared data to checkpoints, and on into the comparison."""

import contextlib
import csv
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spo.config import Config, ScoringConfig, load_config
from spo.errors import ModelError
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import add_lora
from spo.models.lora_file import WEIGHTS
from spo.preference.score import PreferenceScorer
from spo.stages import align, evaluate, prepare, train_preference
from spo.tracking import NullTracker
from spo.training.preference_scorer import LoadedPreference, load_scorer
from spo.workspace import Workspace
from tests.test_pipeline import make_project

SEEDS = (0, 5)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared, with a preference model and three methods, one of them aligned with two seeds."""
    root = make_project(tmp_path_factory.mktemp("align") / "project", "sd15")
    path = root / "configs" / "own.yaml"
    values = yaml.safe_load(path.read_text())
    watch = {"every": 1, "num_prompts": 2, "metric": {"kind": "oracle"}, "score": "aesthetic"}
    common = {"epochs": 1, "checkpoints": 2, "batch_size": 8, "lora": {"rank": 2}, "watch": watch}
    values["align"] |= {
        "d3po": {"method": "d3po", "prompts_per_rollout": 6, **common},
        "dpo": {"method": "diffusion_dpo", "beta": 100.0, **common},
    }
    path.write_text(yaml.safe_dump(values))
    (root / "params.yaml").write_text(f"profile: own\nmethods: [spo, d3po, dpo]\ntraining_seeds: {list(SEEDS)}\n")
    with contextlib.chdir(root):
        config = load_config()
        prepare.run(config, tracker=NullTracker())
        train_preference.run(config, "pixel", tracker=NullTracker())
        for name in config.methods:
            align.run(config, name, SEEDS[0], tracker=NullTracker())
        align.run(config, "dpo", SEEDS[1], tracker=NullTracker())
    return root


@pytest.fixture(scope="module")
def config(project: Path) -> Config:
    return load_config(project)


def preference_of(config: Config, policy: LatentDiffusion) -> LoadedPreference:
    return LoadedPreference(config, "pixel", Path(), policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spo", "d3po", "dpo"])
def test_a_method_leaves_checkpoints_with_their_cost_and_its_history(project: Path, config: Config, name: str) -> None:
    folder = Workspace(config, project).aligned(name, 0)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "history.csv", "metrics.json", "timesteps.csv", "watch.csv"]  # fmt: skip
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    costs = [json.loads((checkpoint / "cost.json").read_text()) for checkpoint in checkpoints]
    assert 0 < costs[0]["unet_forwards"] < costs[1]["unet_forwards"]
    assert any(
        value.any() for key, value in load_file(checkpoints[-1] / WEIGHTS).items() if "lora_B" in key or "up" in key
    )
    with (folder / "history.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == costs[-1]["updates"]


@pytest.mark.slow
def test_a_preference_model_that_was_trained_blind_to_t_scores_blindly(project: Path, config: Config) -> None:
    with contextlib.chdir(project):
        models = {"pixel": config.preference_models["pixel"].model_copy(update={"blind": True})}
        policy = align.build_policy(config, "spo")
        seeing = load_scorer(config, "pixel", Path(), policy)
        blind = load_scorer(config.model_copy(update={"preference_models": models}), "pixel", Path(), policy)
    assert isinstance(seeing, PreferenceScorer) and isinstance(blind, PreferenceScorer)
    with torch.no_grad():  # three steps of training change too little
        for parameter in seeing.model.final_modulation.parameters():
            parameter.add_(0.1)
        blind.model.load_state_dict(seeing.model.state_dict())
    images, text = torch.rand(2, 3, 16, 16), seeing.encode(["a cat", "a dog"])
    early, late = torch.full((2,), 900), torch.zeros(2, dtype=torch.long)
    assert torch.equal(blind.score_images(images, text, early), blind.score_images(images, text, late))
    assert torch.equal(blind.score_images(images, text, early), seeing.score_images(images, text, late))
    assert not torch.equal(seeing.score_images(images, text, early), seeing.score_images(images, text, late))


@pytest.mark.slow
def test_method_and_watch_share_one_preference_model(project: Path, config: Config) -> None:
    with contextlib.chdir(project):
        policy = align.build_policy(config, "spo")
        preference = preference_of(config, policy)
        method = align.build_inputs(config, "spo", policy, preference, root=Path()).load_scorer(
            ScoringConfig(timestep=7)
        )
        watch = preference.scorer()
    assert isinstance(method, PreferenceScorer) and isinstance(watch, PreferenceScorer)
    assert method.model is watch.model
    assert (method.timestep, watch.timestep) == (7, None)


@pytest.mark.slow
def test_the_loading_of_models_and_pairs_is_no_part_of_the_seconds(
    project: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    seconds, build_method = [0.0], align.build_method

    def slowly(*arguments: Any, **options: Any) -> Any:
        seconds[0] += 1000
        return build_method(*arguments, **options)

    monkeypatch.setattr(align, "build_method", slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    align.run(config, "spo", 7, tracker=NullTracker())
    assert seconds[0] == 1000
    assert json.loads((Workspace(config).aligned("spo", 7) / "metrics.json").read_text())["seconds"] == 0
    shutil.rmtree(Workspace(config).aligned("spo", 7))


@pytest.mark.slow
def test_training_seeds_differ_and_lie_side_by_side(project: Path, config: Config) -> None:
    one, other = (
        load_file(sorted((Workspace(config, project).aligned("dpo", seed) / "checkpoints").iterdir())[-1] / WEIGHTS)
        for seed in SEEDS
    )
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_diffusion_dpo_trains_without_guidance_and_the_others_with_it(config: Config, project: Path) -> None:
    with contextlib.chdir(project):
        assert {name: align.build_policy(config, name).sampler.guidance_scale for name in config.methods} == {
            "spo": 5.0, "d3po": 5.0, "dpo": 1.0}  # fmt: skip


@pytest.mark.slow
def test_the_comparison_has_a_column_for_every_method(project: Path, config: Config) -> None:
    one_seed = config.model_copy(update={"training_seeds": SEEDS[:1]})
    with contextlib.chdir(project):
        evaluate.run(one_seed, tracker=NullTracker())
    metrics = json.loads((Workspace(config, project).evaluate / "metrics.json").read_text())
    assert {"base", *config.methods} <= set(metrics)
    assert all((Workspace(config, project).evaluate / "lora" / name).is_dir() for name in config.methods)


@pytest.mark.slow
def test_a_watched_method_records_the_scores_of_its_metric(project: Path, config: Config) -> None:
    with (Workspace(config, project).aligned("dpo", 0) / "watch.csv").open(newline="") as file:
        looks = list(csv.DictReader(file))
    assert float(looks[0]["gap"]) == 0
    assert len(looks) > 1 and all(0 <= float(look["independent"]) <= 1 for look in looks)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "full fine-tuning"])
def test_a_base_in_half_precision_is_watched_under_autocast_only_for_full_fine_tuning(
    project: Path, config: Config, monkeypatch, full
) -> None:
    """Under autocast a VAE that the pipeline runs in float32, as SDXL's own, would compute in half precision."""
    half = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    generate, seen = align.generate, []

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return generate(*arguments, **options)

    monkeypatch.setattr(align, "generate", recorded)
    with contextlib.chdir(project):
        policy = align.build_policy(half, "dpo")
        if full:
            policy.network.unfreeze()
        else:
            add_lora(policy.network.module, half.align["dpo"].lora, seed=0)
        watch = align.build_watch(half, "dpo", policy, preference_of(half, policy), root=Path())
        assert watch is not None
        pictures = watch.paint()
    assert seen == [full]
    assert pictures.shape[0] == 2
    assert pictures.isfinite().all()


@pytest.mark.slow
def test_without_its_metrics_weights_a_run_continues_without_a_watch_unless_the_watch_may_end_it(
    project: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    def watched(**settings: Any) -> Config:
        values = config.model_dump()
        metric = {"kind": "laion_aesthetic", "head": "nowhere.pth"}
        values["align"]["dpo"]["watch"] |= {"metric": metric, "score": "laion_aesthetic", **settings}
        return Config.model_validate(values)

    with contextlib.chdir(project):
        policy = align.build_policy(config, "dpo")
        assert align.build_watch(watched(), "dpo", policy, preference_of(watched(), policy), root=Path()) is None
        with pytest.raises(ModelError, match="is no file here; put one there"):
            align.build_watch(watched(stop_after_worse=2), "dpo", policy, preference_of(watched(), policy), root=Path())
    left_out, unwatched = capsys.readouterr().out.splitlines()[-2:]
    assert left_out.startswith("laion_aesthetic: left out, ")
    assert unwatched == "align dpo runs without a watch"


def test_changed_labels_are_another_run_to_a_method_that_learns_from_pairs(project: Path, config: Config) -> None:
    """So a stopped run of Diffusion-DPO never continues on other labels; SPO knows labels by its preference model."""
    pseudo = {"kind": "pseudo", "model": "nobody/model", "tie_margin": 0.2}
    other = Config.model_validate({**config.model_dump(), "labels": pseudo})
    keys = {
        name: [align.state_store(each, name, 0, project).made_by for each in (config, other)] for name in ("dpo", "spo")
    }
    assert keys["dpo"][0] != keys["dpo"][1]
    assert keys["spo"][0] == keys["spo"][1]
