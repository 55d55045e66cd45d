"""Two processes come to what one does; and where one of them fails, the other ends."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spo.config import LoraConfig, OptimizerConfig, SpoConfig, TrainPreferenceConfig
from spo.core.types import Pairs
from spo.methods.spo import Spo
from spo.models.lora import add_lora
from spo.preference.checkpoint import load_clip
from spo.runtime import distributed
from spo.tracking import NullTracker
from spo.training.align import align
from spo.training.preference import StepAwareTraining
from spo.world.pretraining.clip import new_clip, new_tokenizer, save_clip
from tests.models.tiny import make_tiny_denoiser, make_tiny_pipeline, shake
from tests.training.test_preference import make_pairs

PROMPTS = ["a cat", "a dog", "a house", "a tree", "a boat"]
SETTINGS = {
    "epochs": 1,
    "prompts_per_rollout": 4,  # 2 and 2, then 1 and none
    "candidates": 2,
    "first_step": 2,
    "threshold": 0.0,
    "batch_size": 5,
    "micro_batch_size": 2,
    "checkpoints": 1,
    "lora": LoraConfig(rank=2),
    "optimizer": OptimizerConfig(learning_rate=1e-3),
}
SECONDS = 300  # until a hang is one


class PickyScorer:
    """Prefers bright images, but has no opinion on the first prompts of a batch: of those no pair is kept."""

    def encode(self, prompts):
        return torch.tensor([[float(prompt in PROMPTS[2:])] for prompt in prompts])

    def __call__(self, candidates):
        return 1e4 * candidates.images.mean(dim=(2, 3, 4)) * candidates.text[:, 0]


def run(pipeline: Path, folder: Path) -> dict[str, Any]:
    """Align once; the pairs of all rounds, the metrics and the adapter's weights."""
    policy = make_tiny_denoiser("sd15", pipeline)
    config = SpoConfig(**SETTINGS)
    add_lora(policy.network.module, config.lora, seed=0)
    shake(policy, scale=0.05)
    method = Spo(config, policy, PickyScorer(), PROMPTS, seed=0)
    rounds = []
    collect = method.collect

    def recorded(epoch, *, skip=0):
        for round_ in collect(epoch, skip=skip):
            rounds.append(round_)
            yield round_

    method.collect = recorded
    folder.mkdir()
    metrics = align(method, policy, config, folder, NullTracker())
    return {
        "metrics": {name: value for name, value in metrics.items() if name != "seconds"},
        "measured": [dict(round_.measured) for round_ in rounds],
        "pairs": Pairs.cat([round_.examples for round_ in rounds if round_.examples is not None]),
        "weights": [parameter.detach() for parameter in policy.network.parameters()],
    }


def train_preference(pipeline: Path, clip: Path) -> dict[str, Any]:
    """Three steps of an odd batch; the model's weights and each step's measurements."""
    config = TrainPreferenceConfig(start_from="-", steps=3, batch_size=3, learning_rate=1e-3, warmup_steps=0)
    base = make_tiny_denoiser("sd15", pipeline)
    preference = load_clip(clip, generator=torch.Generator().manual_seed(0))
    training = StepAwareTraining(base, preference, config)
    pairs = replace(make_pairs(training, 8), weight=torch.arange(1.0, 9.0))
    start = flat(preference.model.parameters()).clone()
    rows = list(training.train(pairs, seed=0))
    return {"rows": rows, "start": start, "weights": flat(preference.model.parameters())}


def flat(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def process(rank: int, port: int, pipeline: Path, clip: Path, out: Path) -> None:
    """One of two processes: aligns, then process 1 fails while process 0 waits for it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.join()
    assert (distributed.rank(), distributed.count()) == (rank, 2)
    aligned, trained = run(pipeline, out.with_suffix("")), train_preference(pipeline, clip)
    torch.save({"align": aligned, "preference": trained}, out)
    if rank == 1:
        sys.exit(3)
    try:
        distributed.gather(torch.zeros(1))
    except RuntimeError:
        sys.exit(4)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory):
    """What one process comes to, and each of two; and the two's exit codes."""
    folder = tmp_path_factory.mktemp("distributed")
    pipeline, clip = make_tiny_pipeline("sd15", folder / "model"), folder / "clip"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_clip(new_clip(tokenizer := new_tokenizer()), tokenizer, clip)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    files = [folder / f"rank-{rank}.pt" for rank in range(2)]
    processes = [spawn.Process(target=process, args=(rank, port, pipeline, clip, files[rank])) for rank in range(2)]
    for each in processes:
        each.start()
    alone = {"align": run(pipeline, folder / "alone"), "preference": train_preference(pipeline, clip)}
    for each in processes:
        each.join(SECONDS)
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    return alone, [torch.load(file, weights_only=False) for file in files], codes


@pytest.fixture(scope="module")
def aligned(outcomes):
    alone, both, _ = outcomes
    return alone["align"], [other["align"] for other in both]


def test_two_processes_collect_the_pairs_of_one_in_its_order(aligned):
    alone, both = aligned
    for other in both:
        assert torch.equal(other["pairs"].t, alone["pairs"].t)
        torch.testing.assert_close(other["pairs"].x_t, alone["pairs"].x_t, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other["pairs"].x_prev, alone["pairs"].x_prev, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other["pairs"].margin, alone["pairs"].margin, atol=1e-3, rtol=1e-3)


def test_two_processes_come_to_the_adapter_of_one(aligned):
    alone, both = aligned
    assert alone["metrics"]["updates"] >= 3
    for weights in zip(alone["weights"], *(other["weights"] for other in both), strict=True):
        torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=0)
        assert torch.equal(weights[1], weights[2])


def test_two_processes_train_the_preference_model_of_one(outcomes):
    alone, both, _ = outcomes
    ours, first, second = (each["preference"]["weights"] for each in (alone, *both))
    assert torch.equal(first, second)
    moved = ours - alone["preference"]["start"]
    assert (first - ours).norm() < 1e-2 * moved.norm()  # Adam turns the rounding of a gradient near 0 into a step
    for ours, theirs in zip(alone["preference"]["rows"], both[0]["preference"]["rows"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-6)


def test_what_is_recorded_is_of_all_processes(aligned):
    alone, both = aligned
    for other in both:
        assert {**other["metrics"], "unet_forwards": 0, "vae_decodes": 0, "kept_share": 0} == {
            **alone["metrics"],
            "unet_forwards": 0,
            "vae_decodes": 0,
            "kept_share": 0,
        }
        assert other["metrics"]["kept_share"] == alone["metrics"]["kept_share"]
        assert other["metrics"]["unet_forwards"] > alone["metrics"]["unet_forwards"]  # an idle process samples, too
        for ours, theirs in zip(alone["measured"], other["measured"], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-3)


def test_a_process_that_fails_does_not_leave_the_other_waiting(outcomes):
    *_, codes = outcomes
    assert codes == [4, 3]


def test_shares_follow_one_another_and_differ_by_one_at_most(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 3)
    for n in (0, 1, 2, 3, 7):
        parts = []
        for rank in range(3):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(list(range(n))[distributed.share(n)])
        assert [row for part in parts for row in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
