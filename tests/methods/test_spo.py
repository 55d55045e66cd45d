"""SPO's loss and its collection, over real networks of random weights."""

import math
from pathlib import Path

import pytest
import torch

from spo.config import LoraConfig, SpoConfig
from spo.core.types import Pairs
from spo.methods.sampled import step_log_prob
from spo.methods.spo import Spo
from spo.models.base import LatentDiffusion
from spo.models.lora import add_lora
from tests.models.tiny import make_tiny_denoiser, make_tiny_pipeline, shake

PROMPTS = ["a cat", "a dog", "a house", "a tree", "a boat"]


class BrightnessScorer:
    """Prefers bright images; enough to tell candidates apart."""

    def encode(self, prompts):
        return torch.zeros(len(prompts), 1)

    def __call__(self, images, text, t):
        return 1e3 * images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline("sd15", tmp_path_factory.mktemp("sd15"))


@pytest.fixture
def policy(folder: Path) -> LatentDiffusion:
    denoiser = make_tiny_denoiser("sd15", folder)
    add_lora(denoiser.unet, LoraConfig(rank=2), seed=0)
    return denoiser


def make_spo(policy: LatentDiffusion, **settings) -> Spo:
    values = {"prompts_per_rollout": 2, "candidates": 3, "first_step": 1, "threshold": 0.0, **settings}
    return Spo(SpoConfig(**values), policy, BrightnessScorer(), PROMPTS)


def collect(method: Spo, epoch: int = 0) -> list[Pairs]:
    return [round_.pairs for round_ in method.collect(epoch) if round_.pairs is not None]


def test_the_loss_is_log_2_where_policy_and_reference_are_one(policy):
    method = make_spo(policy)
    pairs = Pairs.cat(collect(method))
    loss = method.loss(pairs)
    assert loss.value.item() == pytest.approx(math.log(2), abs=1e-6)
    assert loss.metrics["clipped"] == 0


def test_a_gradient_step_raises_the_win_above_the_lose(policy):
    method = make_spo(policy, clip_range=None)
    pairs = Pairs.cat(collect(method))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = method.loss(pairs)
    before.value.backward()
    optimizer.step()
    assert method.loss(pairs).value < before.value


def test_swapping_win_and_lose_negates_the_logit(policy):
    method = make_spo(policy, clip_range=None)
    pairs = Pairs.cat(collect(method))
    shake(policy)
    swapped = Pairs(pairs.x_t, pairs.x_prev.flip(1), pairs.t, pairs.t_prev, pairs.cond, pairs.margin)
    assert method.loss(swapped).metrics["logit"] == pytest.approx(-method.loss(pairs).metrics["logit"].item(), rel=1e-5)


def test_a_shared_x_t_gives_what_two_forwards_give_with_half_the_work(policy):
    pairs = Pairs.cat(collect(make_spo(policy)))
    shake(policy)
    assert pairs.x_t.shape[1] == 1
    twice = Pairs(pairs.x_t.expand(-1, 2, -1, -1, -1), pairs.x_prev, pairs.t, pairs.t_prev, pairs.cond, pairs.margin)
    policy.forwards = 0
    shared = step_log_prob(policy, pairs)
    forwards, policy.forwards = policy.forwards, 0
    separate = step_log_prob(policy, twice)
    torch.testing.assert_close(shared, separate, rtol=1e-4, atol=1e-5)
    assert policy.forwards == 2 * forwards


def test_ratios_at_the_clamp_are_counted_and_have_no_gradient(policy):
    method = make_spo(policy, clip_range=0.1)
    pairs = Pairs.cat(collect(method))
    shake(policy, scale=2.0)
    loss = method.loss(pairs)
    assert loss.metrics["clipped"] > 0.5


def test_an_epoch_visits_every_prompt_once_in_an_order_of_its_own(policy):
    method = make_spo(policy)
    seen = []
    method.policy.encode = lambda prompts, encode=policy.encode: seen.extend(prompts) or encode(prompts)
    list(method.collect(0))
    first, seen[:] = list(seen), []
    list(method.collect(1))
    assert sorted(first) == sorted(seen) == sorted(PROMPTS)
    assert first != seen


def test_a_cap_on_rollouts_shortens_the_epoch(policy):
    assert make_spo(policy).rounds_per_epoch == 3
    method = make_spo(policy, rollouts_per_epoch=1)
    assert len(list(method.collect(0))) == method.rounds_per_epoch == 1


def test_the_same_epoch_gives_the_same_pairs_again(policy):
    one, other = Pairs.cat(collect(make_spo(policy))), Pairs.cat(collect(make_spo(policy)))
    assert torch.equal(one.x_prev, other.x_prev)


def test_segments_train_on_every_step_of_both_paths(policy):
    method = make_spo(policy, branch_steps=4)
    rounds = list(method.collect(0))
    assert [tally.t for tally in rounds[0].tallies] == policy.timesteps[1:].tolist()
    pairs = Pairs.cat([round_.pairs for round_ in rounds])
    assert pairs.x_t.shape[1] == 2
    assert sorted(pairs.t.unique().tolist(), reverse=True) == policy.timesteps[1:].tolist()
    assert method.loss(pairs).value.item() == pytest.approx(math.log(2), abs=1e-6)
