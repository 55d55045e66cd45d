"""SPO's own: shared forwards, the clamp, segments, the order of prompts, and a preference model blind to t."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spo.core.gaussian import log_prob
from spo.core.types import Pairs
from spo.methods.sampled import step_log_prob
from spo.methods.spo import Spo
from spo.models.latent_diffusion import LatentDiffusion
from tests.methods.tiny import PROMPTS, make_method
from tests.models.tiny import shake
from tests.training.steps import assert_same_up_to_rounding, flat

FORWARDS = 2  # of a sample, with and without its prompt


def make_spo(policy: LatentDiffusion, **settings) -> Spo:
    method = make_method("spo", policy, **settings)
    assert isinstance(method, Spo)
    return method


def collect(method: Spo, epoch: int = 0) -> list[Pairs]:
    return [round_.examples for round_ in method.collect(epoch) if round_.examples is not None]


def test_a_shared_x_t_gives_what_two_forwards_give_with_half_the_work(policy):
    pairs = Pairs.cat(collect(make_spo(policy)))
    shake(policy)
    assert pairs.x_t.shape[1] == 1
    output = policy.predict(pairs.x_t[:, 0], pairs.t, pairs.cond)
    transition = policy.transition(output, pairs.x_t[:, 0], pairs.t, pairs.t_prev)
    policy.network.forwards = 0
    shared = step_log_prob(policy, pairs)
    assert policy.network.forwards == FORWARDS * len(pairs)
    for side in range(2):
        expected = log_prob(transition, pairs.x_prev[:, side])
        torch.testing.assert_close(shared[:, side], expected, rtol=1e-4, atol=1e-5)


def log_prob_and_gradient(policy: LatentDiffusion, pairs: Pairs) -> tuple[Tensor, Tensor, float]:
    """log p of win and lose (n, 2), the adapter's gradient of a weighted sum of them, and the network's forwards."""
    policy.network.forwards = 0
    policy.network.module.zero_grad()
    found = step_log_prob(policy, pairs)
    (found * torch.tensor([1.0, -0.3])).sum().backward()
    return found.detach(), flat(p.grad for p in policy.network.parameters()), policy.network.forwards


def test_among_pairs_that_share_no_x_t_those_that_do_still_take_one_forward(policy):
    """The first of a segment's four steps branches from one x_t: 1 + 2 + 2 + 2 forwards, not 8."""
    pairs = Pairs.cat(collect(make_spo(policy, branch_steps=4)))
    shuffled = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    shake(policy)
    ours, gradient, forwards = log_prob_and_gradient(policy, shuffled)
    assert forwards == FORWARDS * len(pairs) * 7 / 4
    apart = shuffled.x_t + torch.tensor([0.0, 1e-6]).view(1, 2, 1, 1, 1)  # now none share
    theirs, expected, forwards = log_prob_and_gradient(policy, replace(shuffled, x_t=apart))
    assert forwards == FORWARDS * len(pairs) * 2
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert_same_up_to_rounding(gradient, expected)


def test_ratios_at_the_clamp_are_counted_and_have_no_gradient(policy):
    method = make_spo(policy, clip_range=0.1)
    pairs = Pairs.cat(collect(method))
    shake(policy, scale=2.0)
    loss = method.loss(pairs)
    assert loss.metrics["clipped"] > 0.5


def test_an_epoch_visits_every_prompt_once_in_an_order_of_its_own(policy, monkeypatch):
    method = make_spo(policy)
    seen, encode = [], policy.network.encode
    monkeypatch.setattr(policy.network, "encode", lambda prompts: seen.extend(prompts) or encode(prompts))
    list(method.collect(0))
    first, seen[:] = list(seen), []
    list(method.collect(1))
    assert sorted(first) == sorted(seen) == sorted(PROMPTS)
    assert first != seen


def test_a_cap_on_rollouts_shortens_the_epoch(policy):
    assert make_spo(policy).rounds_per_epoch == 3
    method = make_spo(policy, rollouts_per_epoch=1)
    assert len(list(method.collect(0))) == method.rounds_per_epoch == 1


def test_segments_train_on_every_step_of_both_paths(policy):
    method = make_spo(policy, branch_steps=4)
    rounds = list(method.collect(0))
    assert [tally.t for tally in rounds[0].tallies] == policy.timesteps[1:].tolist()
    pairs = Pairs.cat([round_.examples for round_ in rounds])
    assert pairs.x_t.shape[1] == 2
    assert sorted(pairs.t.unique().tolist(), reverse=True) == policy.timesteps[1:].tolist()
    assert method.loss(pairs).value.item() == pytest.approx(math.log(2), abs=1e-6)


def test_a_threshold_that_rises_keeps_fewer_pairs_at_noisy_steps(policy):
    [plain], [rising] = (
        list(make_spo(policy, prompts_per_rollout=5, threshold=threshold, first_step=0).collect(0))
        for threshold in (0.0, {"low": 0.0, "high": 1.0})
    )
    assert plain.tallies[0].num_kept > 0 and rising.tallies[0].num_kept == 0  # the noisiest step: no margin is above 1
    assert rising.tallies[-1].num_kept == plain.tallies[-1].num_kept > 0  # the last one has the least std
    assert all(few.num_kept <= many.num_kept for few, many in zip(rising.tallies, plain.tallies, strict=True))


@pytest.mark.parametrize("settings", [{"continue_from": "win"}, {"continue_from": "lose"}, {"pairing": "random"}])
def test_an_ablation_changes_the_pairs(policy, settings):
    plain, ablated = (Pairs.cat(collect(make_spo(policy, **more))) for more in ({}, settings))
    assert plain.x_prev.shape != ablated.x_prev.shape or not torch.equal(plain.x_prev, ablated.x_prev)
