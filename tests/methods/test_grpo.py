"""GRPO: a method without pairs, from its advantages to a trained policy."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from spo.config import GrpoConfig, SamplingConfig
from spo.core.gaussian import log_prob
from spo.core.losses import clipped_advantage_loss, gaussian_divergence
from spo.core.selection import group_advantage
from spo.core.types import Steps, Transition
from spo.methods.grpo import Grpo
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import add_lora
from spo.tracking import NullTracker
from spo.training.align import align
from tests.methods.tiny import PROMPTS, BrightnessScorer, assert_a_step_raises_what_has_an_advantage
from tests.models.tiny import FAMILIES, make_tiny_denoiser, shake

K = 3
families = pytest.mark.parametrize("family", FAMILIES, scope="module")


def make(policy: LatentDiffusion, **settings) -> Grpo:
    config = GrpoConfig(**{"candidates": K, "prompts_per_rollout": 2, "clip_range": 0.2, **settings})
    return Grpo(config, policy, BrightnessScorer(), PROMPTS)


def first_steps(method: Grpo) -> Steps:
    examples = next(iter(method.collect(0))).examples
    assert examples is not None
    return examples


def test_advantages_are_scores_standardised_in_their_group() -> None:
    scores = torch.tensor([[1.0, 5.0, 0.0], [2.0, 5.0, 0.0], [6.0, 5.0, 1e6]])
    advantage = group_advantage(scores, limit=1.1)
    expected = torch.tensor([-2.0, -1.0, 3.0]) / (torch.tensor([1.0, 2.0, 6.0]).std() + 1e-4)
    torch.testing.assert_close(advantage[:, 0], expected.clamp(-1.1, 1.1))
    assert torch.equal(advantage[:, 1], torch.zeros(3))  # equal scores teach nothing
    assert advantage[2, 2] == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [  # the clip only ever takes away a gain: PPO's figure 1
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -2.0),
        (1.5, -2.0, 3.0, 2.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.1, 2.0, -2.2, -2.0),
    ],
)
def test_the_loss_is_ppos_with_its_gradient(ratio: float, advantage: float, expected: float, slope: float) -> None:
    given = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    loss = clipped_advantage_loss(given, torch.tensor([advantage], dtype=torch.float64), clip_range=0.2)
    loss.value.backward()
    assert loss.value.item() == pytest.approx(expected)
    assert given.grad is not None and given.grad.item() == pytest.approx(slope)
    assert loss.metrics["clipped"].item() == (abs(ratio - 1) > 0.2)


def test_the_divergence_is_that_of_two_gaussians() -> None:
    mean, other, std = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    std = std.abs().mean(dim=(1, 2, 3), keepdim=True)
    one, two = (torch.distributions.Normal(each, std.expand_as(each)) for each in (mean, other))
    expected = torch.distributions.kl_divergence(one, two).mean(dim=(1, 2, 3))
    found = gaussian_divergence(Transition(mean, std, mean), Transition(other, std, other))
    torch.testing.assert_close(found, expected)


@families
def test_every_step_of_every_trajectory_is_an_example_with_its_own_density(policy: LatentDiffusion) -> None:
    method = make(policy)
    rounds = list(method.collect(0))
    assert len(rounds) == method.rounds_per_epoch == 3
    steps, count = first_steps(method), policy.num_trainable
    assert len(steps) == count * K * 2
    by_step = [steps[index] for index in torch.arange(len(steps)).split(K * 2)]
    for now, then in pairwise(by_step):
        assert torch.equal(now.x_prev, then.x_t) and torch.equal(now.t_prev, then.t)
    assert torch.equal(by_step[0].x_t[0], by_step[0].x_t[K - 1])  # a group shares its first noise
    assert not torch.equal(by_step[0].x_t[0], by_step[0].x_t[K])
    with torch.no_grad():
        output = policy.predict(steps.x_t, steps.t, steps.cond)
        density = log_prob(policy.transition(output, steps.x_t, steps.t, steps.t_prev), steps.x_prev)
    torch.testing.assert_close(density, steps.log_p, rtol=1e-3, atol=1e-4)
    groups = steps.advantage.unflatten(0, (count, 2, K))
    torch.testing.assert_close(groups.mean(dim=2), torch.zeros(count, 2), atol=1e-3, rtol=0)
    assert torch.equal(groups[0], groups[-1])


@families
def test_at_the_policy_that_sampled_ratios_are_1_and_a_step_raises_what_has_an_advantage(
    policy: LatentDiffusion,
) -> None:
    method = make(policy)
    assert_a_step_raises_what_has_an_advantage(method, first_steps(method))


@families
def test_the_divergence_from_the_reference_counts_by_its_weight(policy: LatentDiffusion) -> None:
    method, held = make(policy), make(policy, kl_weight=10.0)
    steps = first_steps(method)
    assert held.loss(steps).metrics["divergence"] == 0
    shake(policy)
    plain, loss = method.loss(steps), held.loss(steps)
    assert "divergence" not in plain.metrics and loss.metrics["divergence"] > 0
    torch.testing.assert_close(loss.value, plain.value + 10 * loss.metrics["divergence"])


@families
def test_it_trains_in_the_loop_of_all_methods(family: str, folder: Path, tmp_path: Path) -> None:
    policy = make_tiny_denoiser(family, folder)
    method = make(policy, epochs=1, batch_size=16, micro_batch_size=5, checkpoints=1)
    add_lora(policy.network.module, method.config.lora, seed=0)
    metrics = align(method, policy, method.config, tmp_path / "out", NullTracker())
    assert metrics["num_examples"] == policy.num_trainable * K * len(PROMPTS)
    assert metrics["kept_share"] == 1.0
    assert metrics["updates"] == sum(math.ceil(policy.num_trainable * K * n / 16) for n in (2, 2, 1))
    assert any(weight.abs().max() > 0 for weight in policy.network.parameters()[1::2])
    assert (tmp_path / "out" / "checkpoints").is_dir()


def test_steps_without_noise_are_refused() -> None:
    assert "set sampling.eta above 0" in str(GrpoConfig().misfit(SamplingConfig(eta=0.0)))
    assert GrpoConfig().misfit(SamplingConfig(eta=1.0)) is None
