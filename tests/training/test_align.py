"""The training loop over real networks of random weights."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spo.config import LoraConfig, OptimizerConfig, SpoConfig
from spo.errors import ConfigError, TrainingError
from spo.methods.spo import Spo
from spo.models.lora import WEIGHTS, add_lora
from spo.tracking import NullTracker
from spo.training.align import align, build_optimizer
from tests.methods.test_spo import PROMPTS, BrightnessScorer
from tests.models.tiny import make_tiny_denoiser, make_tiny_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline("sd15", tmp_path_factory.mktemp("sd15"))


def train(pipeline: Path, folder: Path, **settings) -> dict:
    folder.mkdir()
    values = {
        "epochs": 2,
        "prompts_per_rollout": 3,
        "candidates": 2,
        "first_step": 2,
        "threshold": 0.0,
        "batch_size": 4,
        "checkpoints": 2,
        "lora": LoraConfig(rank=2),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        **settings,
    }
    seed = values.pop("seed", 0)
    config = SpoConfig(**values)
    policy = make_tiny_denoiser("sd15", pipeline)
    add_lora(policy.unet, config.lora, seed=seed)
    method = Spo(config, policy, BrightnessScorer(), PROMPTS, seed=seed)
    return align(method, policy, config, folder, NullTracker(), seed=seed)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_checkpoints_are_spread_over_the_run_and_tell_their_cost(pipeline, tmp_path):
    metrics = train(pipeline, tmp_path / "run")
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000002", "step-000004"]
    costs = [json.loads((folder / "cost.json").read_text()) for folder in folders]
    assert 0 < costs[0]["unet_forwards"] < costs[1]["unet_forwards"] == metrics["unet_forwards"]
    assert 0 < costs[0]["updates"] < costs[1]["updates"] == metrics["updates"]
    first, last = (load_file(folder / WEIGHTS) for folder in folders)
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_history_has_a_row_for_every_update_and_timestep(pipeline, tmp_path):
    metrics = train(pipeline, tmp_path / "run")
    history = rows(tmp_path / "run" / "history.csv")
    assert [int(row["update"]) for row in history] == list(range(1, metrics["updates"] + 1))
    timesteps = rows(tmp_path / "run" / "timesteps.csv")
    assert [int(row["timestep"]) for row in timesteps] == [401, 201, 1]  # of 5 steps the last 3
    assert sum(int(row["kept"]) for row in timesteps) == metrics["num_pairs"]
    assert all(int(row["branched"]) == 2 * len(PROMPTS) for row in timesteps)


def test_the_same_seed_gives_the_same_weights(pipeline, tmp_path):
    train(pipeline, tmp_path / "one")
    train(pipeline, tmp_path / "other")
    one, other = (load_file(tmp_path / name / "checkpoints" / "step-000004" / WEIGHTS) for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_seed_gives_other_weights(pipeline, tmp_path):
    train(pipeline, tmp_path / "one")
    train(pipeline, tmp_path / "other", seed=1)
    one, other = (load_file(tmp_path / name / "checkpoints" / "step-000004" / WEIGHTS) for name in ("one", "other"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_an_epoch_without_a_kept_pair_ends_the_run_with_the_mend(pipeline, tmp_path):
    with pytest.raises(TrainingError, match=r"no pair was kept in a whole epoch: threshold=1\.0.*lower"):
        train(pipeline, tmp_path / "run", threshold=1.0)


def test_training_raises_what_the_scorer_prefers(pipeline, tmp_path):
    train(pipeline, tmp_path / "run", epochs=6, clip_range=0.5, optimizer=OptimizerConfig(learning_rate=5e-3))
    scores = [float(row["score"]) for row in rows(tmp_path / "run" / "history.csv")]
    third = len(scores) // 3
    assert sum(scores[-third:]) / third > sum(scores[:third]) / third


def test_eight_bit_adam_says_what_it_lacks():
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="needs bitsandbytes"):
            build_optimizer([], OptimizerConfig(eight_bit=True))
    else:
        weight = torch.nn.Parameter(torch.zeros(2))
        assert type(build_optimizer([weight], OptimizerConfig(eight_bit=True))).__name__ == "AdamW8bit"
