"""GRPO of single steps: all candidates of one x_t are one example."""

import math
from pathlib import Path

import pytest
import torch

from spo.config import SamplingConfig, StepGrpoConfig
from spo.core.gaussian import log_prob
from spo.core.types import Steps
from spo.methods.step_grpo import StepGrpo
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import add_lora
from spo.tracking import NullTracker
from spo.training.align import align
from tests.methods.tiny import PROMPTS, BrightnessScorer, assert_a_step_raises_what_has_an_advantage
from tests.models.tiny import FAMILIES, make_tiny_denoiser

K = 3
families = pytest.mark.parametrize("family", FAMILIES, scope="module")


def make(policy: LatentDiffusion, **settings) -> StepGrpo:
    own = {"candidates": K, "prompts_per_rollout": 2, "clip_range": 0.2, "first_step": 1, **settings}
    return StepGrpo(StepGrpoConfig(**own), policy, BrightnessScorer(), PROMPTS)


def first_steps(method: StepGrpo) -> Steps:
    examples = next(iter(method.collect(0))).examples
    assert examples is not None
    return examples


@families
def test_every_noisy_latent_from_the_first_step_on_is_an_example_with_its_candidates(policy: LatentDiffusion) -> None:
    method = make(policy)
    rounds = list(method.collect(0))
    assert len(rounds) == method.rounds_per_epoch == 3
    steps, count = first_steps(method), policy.num_trainable - 1
    assert len(steps) == count * 2 and steps.x_prev.shape[:2] == (count * 2, K)
    assert sorted(set(steps.t.tolist()), reverse=True) == policy.timesteps[1 : 1 + count].tolist()
    for example in range(len(steps)):
        assert len({tuple(each.flatten().tolist()) for each in steps.x_prev[example]}) == K
    followed = steps.x_prev[:2]  # sampling goes on from one candidate of each prompt
    assert all((followed[i] == steps.x_t[2 + i]).flatten(1).all(dim=1).sum() == 1 for i in range(2))
    torch.testing.assert_close(steps.advantage.mean(dim=1), torch.zeros(len(steps)), atol=1e-2, rtol=0)
    with torch.no_grad():
        output = policy.predict(steps.x_t, steps.t, steps.cond)
        density = log_prob(policy.transition(output, steps.x_t, steps.t, steps.t_prev), steps.x_prev)
    torch.testing.assert_close(density, steps.log_p, rtol=1e-3, atol=1e-4)


@families
def test_one_forward_serves_all_candidates_and_a_step_raises_what_has_an_advantage(policy: LatentDiffusion) -> None:
    method = make(policy)
    steps = first_steps(method)
    policy.network.forwards = 0
    method.loss(steps)
    assert policy.network.forwards == len(steps) * (1 if policy.network.is_distilled else 2)
    assert_a_step_raises_what_has_an_advantage(method, steps)


@families
def test_it_trains_in_the_loop_of_all_methods(family: str, folder: Path, tmp_path: Path) -> None:
    policy = make_tiny_denoiser(family, folder)
    method = make(policy, epochs=1, batch_size=4, micro_batch_size=3, checkpoints=1, look_ahead=1)
    add_lora(policy.network.module, method.config.lora, seed=0)
    metrics = align(method, policy, method.config, tmp_path / "out", NullTracker())
    count = policy.num_trainable - 1
    assert metrics["num_examples"] == count * len(PROMPTS)
    assert metrics["updates"] == sum(math.ceil(count * n / 4) for n in (2, 2, 1))
    assert any(weight.abs().max() > 0 for weight in policy.network.parameters()[1::2])


def test_settings_that_do_not_fit_are_refused() -> None:
    assert "set sampling.eta above 0" in str(StepGrpoConfig().misfit(SamplingConfig(eta=0.0)))
    assert "first_step=20 must be below sampling.steps=20" in str(
        StepGrpoConfig(first_step=20).misfit(SamplingConfig())
    )
    assert StepGrpoConfig().misfit(SamplingConfig(eta=1.0)) is None
