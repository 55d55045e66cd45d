"""The training loop over real networks of random weights."""

import csv
import json
import math
import os
import signal
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from spo.config import AlignConfig, LoraConfig, OptimizerConfig, OracleConfig, SafetyConfig, SamplerConfig, WatchConfig
from spo.core.types import Loss
from spo.errors import TrainingError
from spo.methods.method import Examples, Method
from spo.models.generate import generate
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import add_lora
from spo.models.lora_file import WEIGHTS
from spo.runtime.checkpoint import StateStore
from spo.runtime.saver import HostCopy, Saver
from spo.runtime.stopping import Stopped, stoppable
from spo.tracking import NullTracker
from spo.training import align as loop
from spo.training.align import align, rate_share
from spo.training.watch import Watch
from tests.methods.tiny import METHODS, PROMPTS, make_method
from tests.models.tiny import make_tiny_denoiser, make_tiny_pipeline
from tests.training.steps import PlainSteps, assert_same_up_to_rounding


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline("sd15", tmp_path_factory.mktemp("sd15"))


SETTINGS = {
    "spo": {"prompts_per_rollout": 3, "candidates": 2, "first_step": 2, "batch_size": 4, "clip_range": 0.1},
    "d3po": {"prompts_per_rollout": 3, "batch_size": 8},
    "diffusion_dpo": {"batch_size": 3},
    "grpo": {"prompts_per_rollout": 3, "batch_size": 20},
}


def train(
    pipeline: Path, folder: Path, name: str = "spo", *, seed: int = 0, watched=None, store=None, **settings
) -> dict:
    """`watched`: the values of an independent metric, look by look; store: a folder of states to continue from."""
    folder.mkdir(exist_ok=store is not None)
    values = {
        "epochs": 2,
        "checkpoints": 2,
        "lora": LoraConfig(rank=2),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        **SETTINGS[name],
        **settings,
    }
    policy = make_tiny_denoiser("sd15", pipeline)
    add_lora(policy.network.module, values["lora"], seed=seed)
    method = make_method(name, policy, seed=seed, **values)
    watch = None
    if watched is not None:
        values = iter(watched)
        watch = Watch(
            WatchConfig(every=1, metric=OracleConfig(), score="aesthetic", stop_after_worse=2),
            lambda: paint(policy),
            lambda pictures: pictures.mean(dim=(1, 2, 3)),
            lambda pictures: torch.full((len(pictures),), next(values)),
        )
    states = StateStore(store, {"method": name}) if store else None
    return align(method, policy, method.config, folder, NullTracker(), seed=seed, watch=watch, store=states)


def paint(policy: LatentDiffusion) -> torch.Tensor:
    return generate(
        policy, PROMPTS[:2], [1, 2], sampler=SamplerConfig(steps=2), batch_size=2, label="watch")  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    return load_file(sorted((folder / "checkpoints").iterdir())[-1] / WEIGHTS)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", METHODS)
def test_checkpoints_are_spread_over_the_run_and_have_their_cost(pipeline, tmp_path, name):
    metrics = train(pipeline, tmp_path / "run", name)
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000002", "step-000004"]
    costs = [json.loads((folder / "cost.json").read_text()) for folder in folders]
    assert 0 < costs[0]["unet_forwards"] < costs[1]["unet_forwards"] == metrics["unet_forwards"]
    assert 0 < costs[0]["updates"] < costs[1]["updates"] == metrics["updates"]
    assert (costs[0]["vae_decodes"] > 0) == (name != "diffusion_dpo")
    assert 0 < costs[0]["seconds"] < costs[1]["seconds"]
    first, last = (load_file(folder / WEIGHTS) for folder in folders)
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_history_has_a_row_for_every_update_and_timestep(pipeline, tmp_path):
    metrics = train(pipeline, tmp_path / "run")
    history = rows(tmp_path / "run" / "history.csv")
    assert [int(row["update"]) for row in history] == list(range(1, metrics["updates"] + 1))
    timesteps = rows(tmp_path / "run" / "timesteps.csv")
    assert [int(row["timestep"]) for row in timesteps] == [401, 201, 1]  # of 5 steps the last 3
    assert sum(int(row["kept"]) for row in timesteps) == metrics["num_examples"]
    assert all(int(row["branched"]) == 2 * len(PROMPTS) for row in timesteps)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_weights_and_another_others(pipeline, tmp_path, name):
    for run, seed in {"one": 0, "same": 0, "other": 1}.items():
        train(pipeline, tmp_path / run, name, seed=seed, epochs=1)
    one, same, other = (weights(tmp_path / run) for run in ("one", "same", "other"))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", METHODS)
def test_pairs_in_small_parts_train_as_they_do_at_once(pipeline, tmp_path, monkeypatch, name):
    made = []

    def plain(parameters, *, lr, **_):
        made.append(PlainSteps(parameters, lr))
        return made[-1]

    monkeypatch.setattr("spo.training.align.adamw", plain)
    unclamped = {} if name == "diffusion_dpo" else {"clip_range": None}
    optimizer = OptimizerConfig(learning_rate=1.0, max_grad_norm=1e-3)
    for run, size in {"whole": None, "parts": 1}.items():
        train(pipeline, tmp_path / run, name, epochs=1, micro_batch_size=size, optimizer=optimizer, **unclamped)
    whole, parts = made
    for one, other in zip(whole.gradients, parts.gradients, strict=True):
        assert_same_up_to_rounding(one, other)
    histories = [rows(tmp_path / run / "history.csv") for run in ("whole", "parts")]
    for one, other in zip(*histories, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
        assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-3)
        assert float(one["grad_norm"]) > 1e-3  # so it was clipped


def test_the_rate_rises_over_the_warm_up():
    assert [rate_share(i, 0.5, OptimizerConfig(warmup_updates=3)) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate_share(0, 0.0, OptimizerConfig()) == 1.0


def test_a_linear_schedule_falls_with_the_rounds():
    config = OptimizerConfig(schedule="linear")
    assert [rate_share(9, done, config) for done in (0.0, 0.25, 0.75)] == [1.0, 0.75, 0.25]


def test_log_ratios_by_timestep_are_those_of_the_updates(pipeline, tmp_path):
    train(pipeline, tmp_path / "run", epochs=1, batch_size=1)
    updates, timesteps = rows(tmp_path / "run" / "history.csv"), rows(tmp_path / "run" / "timesteps.csv")
    assert len(timesteps) == 3
    for name in ("log_ratio_win", "log_ratio_lose"):
        recorded = sum(int(row["kept"]) * float(row[name]) for row in timesteps)
        assert recorded == pytest.approx(sum(float(row[name]) for row in updates), rel=1e-3, abs=1e-5)
        assert recorded != 0


def test_an_epoch_without_a_kept_pair_ends_the_run_with_the_remedy(pipeline, tmp_path):
    with pytest.raises(TrainingError, match=r"no example was kept in a whole epoch: threshold=1\.0.*lower"):
        train(pipeline, tmp_path / "run", threshold=1.0)


def test_an_epoch_of_one_round_without_a_kept_pair_names_its_margin(pipeline, tmp_path):
    with pytest.raises(TrainingError, match=r"mean margin is (?!0;)[0-9.e-]+; lower") as caught:
        train(pipeline, tmp_path / "run", threshold=1.0, rollouts_per_epoch=1)
    assert "\n" not in str(caught.value)


def test_training_raises_what_the_scorer_prefers(pipeline, tmp_path):
    train(pipeline, tmp_path / "run", epochs=6, clip_range=0.5, optimizer=OptimizerConfig(learning_rate=5e-3))
    scores = [float(row["score"]) for row in rows(tmp_path / "run" / "history.csv")]
    third = len(scores) // 3
    assert sum(scores[-third:]) / third > sum(scores[:third]) / third


@pytest.mark.parametrize("name", METHODS)
def test_a_watch_changes_nothing_that_is_trained(pipeline, tmp_path, name):
    alone = train(pipeline, tmp_path / "alone", name, epochs=1)
    watched = train(pipeline, tmp_path / "watched", name, epochs=1, watched=[0.1, 0.2, 0.3, 0.4])
    one, other = weights(tmp_path / "alone"), weights(tmp_path / "watched")
    assert all(torch.equal(one[key], other[key]) for key in one)
    for metrics in (alone, watched):
        del metrics["seconds"]
    assert alone == watched  # nor is it counted as training
    looks = rows(tmp_path / "watched" / "watch.csv")
    assert [int(row["round"]) for row in looks] == list(range(watched["rounds"] + 1))
    assert (tmp_path / "alone" / "watch.csv").read_text().strip() == ""


def test_a_watch_that_sees_it_get_worse_ends_the_run_with_a_checkpoint(pipeline, tmp_path):
    metrics = train(pipeline, tmp_path / "run", epochs=5, checkpoints=1, watched=[0.5, 0.6, 0.55, 0.5, 0.9])
    assert metrics["stopped_early"]
    assert metrics["rounds"] == 3
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert [float(row["independent"]) for row in rows(tmp_path / "run" / "watch.csv")] == [0.5, 0.6, 0.55, 0.5]


def test_a_run_that_was_stopped_before_its_last_checkpoint_still_ends_early_when_it_is_resumed(
    pipeline, tmp_path, monkeypatch
):
    module = sys.modules["spo.training.align"]
    save = module.save_checkpoint
    settings = {"epochs": 5, "checkpoints": 1, "watched": [0.5, 0.6, 0.55, 0.5, 0.9], "store": tmp_path / "states"}
    monkeypatch.setattr(module, "save_checkpoint", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped), stoppable():
        train(pipeline, tmp_path / "run", **settings)
    monkeypatch.setattr(module, "save_checkpoint", save)
    metrics = train(pipeline, tmp_path / "run", **settings)
    assert metrics["stopped_early"]
    assert metrics["rounds"] == 3
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]


def test_what_a_run_left_without_a_whole_state_is_no_part_of_the_next(pipeline, tmp_path):
    old = tmp_path / "run" / "checkpoints" / "step-000099"
    old.mkdir(parents=True)
    damaged = tmp_path / "states" / "00000001"
    damaged.mkdir(parents=True)
    train(pipeline, tmp_path / "run", store=tmp_path / "states")
    assert not damaged.exists() or (damaged / "manifest.json").is_file()
    assert [folder.name for folder in sorted(old.parent.iterdir())] == ["step-000002", "step-000004"]


def poisoned(pipeline: Path, bad: tuple[int, ...]) -> tuple[Method, AlignConfig]:
    """SPO whose loss is nan at the updates of these numbers."""
    policy = make_tiny_denoiser("sd15", pipeline)
    settings = {"epochs": 1, "prompts_per_rollout": 5, "candidates": 2, "first_step": 3, "batch_size": 3}
    method = make_method("spo", policy, checkpoints=1, **settings)
    add_lora(policy.network.module, method.config.lora, seed=0)
    calls, loss = count(1), method.loss

    def poisoned_loss(pairs: Examples) -> Loss:
        value = loss(pairs)
        return replace(value, value=value.value * float("nan")) if next(calls) in bad else value

    method.loss = poisoned_loss
    return method, method.config


def test_an_update_that_is_not_finite_is_skipped_and_counted(pipeline, tmp_path, capsys):
    method, config = poisoned(pipeline, bad=(2,))
    metrics = align(method, method.policy, config, tmp_path, NullTracker())
    assert metrics["skipped"] == 1
    history = rows(tmp_path / "history.csv")
    assert [int(row["update"]) for row in history] == [1, 2, 3]  # of 10 pairs, 3 at a time
    assert all(math.isfinite(float(value)) for row in history for value in row.values())
    weights = load_file(tmp_path / "checkpoints" / "step-000001" / WEIGHTS)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert all(math.isfinite(float(row["log_ratio_win"])) for row in rows(tmp_path / "timesteps.csv"))
    assert "an update is skipped: its loss is nan" in capsys.readouterr().err


def test_a_run_of_bad_updates_ends_before_any_is_made(pipeline, tmp_path):
    method, config = poisoned(pipeline, bad=(1, 2, 3, 4))
    before = [parameter.detach().clone() for parameter in method.policy.network.parameters()]
    safety = SafetyConfig(max_skipped_in_a_row=2)
    with pytest.raises(TrainingError, match=r"2 updates in a row.*lower optimizer\.learning_rate"):
        align(method, method.policy, config, tmp_path, NullTracker(), safety=safety)
    assert all(torch.equal(one, other) for one, other in zip(before, method.policy.network.parameters(), strict=True))


def test_running_out_of_memory_while_updating_names_the_micro_batch(pipeline, tmp_path, monkeypatch):
    method, config = poisoned(pipeline, bad=())
    monkeypatch.setattr(method, "loss", lambda pairs: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(TrainingError, match="out of memory: set the method's micro_batch_size below 3"):
        align(method, method.policy, config, tmp_path, NullTracker())


def test_running_out_of_memory_while_sampling_names_the_prompts(pipeline, tmp_path, monkeypatch):
    method, config = poisoned(pipeline, bad=())
    monkeypatch.setattr(method.policy.autoencoder, "decode", lambda latents: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(TrainingError, match="out of memory: lower the method's prompts_per_rollout, now 5"):
        align(method, method.policy, config, tmp_path, NullTracker())


@pytest.mark.parametrize(
    ("family", "name", "micro"),
    [
        ("sd15", "spo", None),
        *(("sd15", name, 2) for name in METHODS),
        ("sd15", "grpo", 7),
        ("sd3", "spo", 2),
        ("flux", "d3po", None),
    ],
)
def test_a_run_that_a_signal_ends_in_an_update_continues_to_the_same_weights_and_history(
    pipeline, tmp_path, family, name, micro
):
    model = pipeline if family == "sd15" else make_tiny_pipeline(family, tmp_path / "model")
    settings = {**SETTINGS[name], "epochs": 2, "checkpoints": 2, "lora": LoraConfig(rank=2), "micro_batch_size": micro}

    def run(folder: Path, *, cut_at: int | None = None) -> dict:
        policy = make_tiny_denoiser(family, model)
        add_lora(policy.network.module, settings["lora"], seed=0)
        method = make_method(name, policy, **settings)
        calls, loss = count(1), method.loss

        def cutting(pairs: Examples) -> Loss:
            value = loss(pairs)
            if next(calls) == cut_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return value

        method.loss = cutting
        store = StateStore(folder / "states", {"method": name})
        return align(method, policy, method.config, folder / "output", NullTracker(), store=store)

    whole = run(tmp_path / "whole")
    for cut_at in (2, 1):
        with pytest.raises(Stopped), stoppable():
            run(tmp_path / "cut", cut_at=cut_at)
    resumed = run(tmp_path / "cut")
    one, other = weights(tmp_path / "whole/output"), weights(tmp_path / "cut/output")
    assert all(torch.equal(one[key], other[key]) for key in one)
    del whole["seconds"], resumed["seconds"]
    assert whole == resumed
    before, after = (rows(tmp_path / run_ / "output/history.csv") for run_ in ("whole", "cut"))
    for row in [*before, *after]:
        del row["seconds"]
    assert before == after


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *, call: int) -> None:
    """Send SIGTERM in the call-th call of a function, after its work is done."""
    original, calls = getattr(owner, name), count(1)

    def stopping(*arguments, **options):
        result = original(*arguments, **options)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(owner, name, stopping)


def saved_rounds(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


def assert_same_runs(folder: Path, whole: dict, resumed: dict) -> None:
    """Of the runs `whole` and `cut`: the weights of each checkpoint, and the metrics."""
    one, other = (sorted((folder / run / "checkpoints").iterdir()) for run in ("whole", "cut"))
    assert [path.name for path in one] == [path.name for path in other]
    for ours, theirs in zip(one, other, strict=True):
        first, second = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}


@pytest.mark.parametrize(
    ("owner", "name", "saved"),
    [(loop.Updater, "backward", [0]), (loop.Updater, "clip_gradient", [0]), (loop.Updater, "step", [1])],
    ids=["in its gradient", "after its gradient", "in its step"],
)
def test_a_round_of_one_update_is_stopped_without_a_copy_of_the_weights(
    pipeline, tmp_path, monkeypatch, owner, name, saved
):
    """Before the optimizer's step nothing has changed; from the step on the round is completed."""
    settings = {"name": "diffusion_dpo", "micro_batch_size": 1}
    whole = train(pipeline, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "take", lambda *_: pytest.fail("the weights are copied"))
        stop_at(patch, owner, name, call=1)
        with pytest.raises(Stopped), stoppable():
            train(pipeline, tmp_path / "cut", store=tmp_path / "states", **settings)
    assert saved_rounds(tmp_path / "states") == saved
    resumed = train(pipeline, tmp_path / "cut", store=tmp_path / "states", **settings)
    assert_same_runs(tmp_path, whole, resumed)


def test_a_round_of_several_updates_that_is_stopped_goes_back_to_its_start(pipeline, tmp_path, monkeypatch):
    whole = train(pipeline, tmp_path / "whole", batch_size=1)
    with monkeypatch.context() as patch:
        stop_at(patch, loop.Updater, "step", call=2)
        with pytest.raises(Stopped), stoppable():
            train(pipeline, tmp_path / "cut", batch_size=1, store=tmp_path / "states")
    assert saved_rounds(tmp_path / "states") == [0]
    resumed = train(pipeline, tmp_path / "cut", batch_size=1, store=tmp_path / "states")
    assert_same_runs(tmp_path, whole, resumed)


@pytest.mark.parametrize(("short", "saved"), [(1e9, 2), (0.0, 1)], ids=["short updates", "long updates"])
def test_a_round_whose_updates_are_short_is_completed_without_a_copy(pipeline, tmp_path, monkeypatch, short, saved):
    """How long they take is known from the round before."""
    settings = {"batch_size": 1, "epochs": 2}
    whole = train(pipeline, tmp_path / "whole", **settings)
    copies, step, hold = [], loop._Alignment._step, Saver.hold

    def stop(run, *arguments):
        if run.cost.rounds == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "SHORT", short)
        patch.setattr(Saver, "hold", lambda saver, state: copies.append(state.number) or hold(saver, state))
        patch.setattr(loop._Alignment, "_step", stop)
        with pytest.raises(Stopped), stoppable():
            train(pipeline, tmp_path / "cut", store=tmp_path / "states", **settings)
    assert saved_rounds(tmp_path / "states")[-1] == saved
    assert copies == ([0] if short else [0, 1])
    resumed = train(pipeline, tmp_path / "cut", store=tmp_path / "states", **settings)
    assert_same_runs(tmp_path, whole, resumed)


def test_a_checkpoint_that_a_stop_prevented_is_written_by_the_resumed_run(pipeline, tmp_path, monkeypatch):
    whole = train(pipeline, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped), stoppable():
            train(pipeline, tmp_path / "cut", store=tmp_path / "states")
    assert not (tmp_path / "cut" / "checkpoints").exists()
    resumed = train(pipeline, tmp_path / "cut", store=tmp_path / "states")
    assert_same_runs(tmp_path, whole, resumed)


@pytest.mark.parametrize("cut_at", [None, 4])
def test_the_seconds_before_and_after_a_saved_state_count_once(pipeline, tmp_path, monkeypatch, cut_at):
    clock, updates, update = [0.0], count(1), loop._Alignment._gradient

    def ten_seconds(*arguments):
        if next(updates) == cut_at:
            raise KeyboardInterrupt
        clock[0] += 10
        return update(*arguments)

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(loop._Alignment, "_gradient", ten_seconds)
    monkeypatch.setattr(Saver, "save_if_due", Saver.save)
    settings = {"store": tmp_path / "states", "batch_size": 8, "epochs": 3}
    if cut_at:
        with pytest.raises(KeyboardInterrupt):
            train(pipeline, tmp_path / "run", **settings)
        clock[0] = 1000.0  # another process, later
    metrics = train(pipeline, tmp_path / "run", **settings)
    assert metrics["seconds"] == 10 * metrics["updates"] > 40
