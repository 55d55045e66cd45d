"""The properties of every method that the training loop relies on, with a real network of random weights."""

import math

import pytest
import torch

from spo.models.latent_diffusion import LatentDiffusion
from tests.methods.tiny import METHODS, batch_settings, make_method, swapped, what_is_learned
from tests.models.tiny import FAMILIES, shake

pytestmark = [
    pytest.mark.parametrize("family", FAMILIES, scope="module"),
    pytest.mark.parametrize("name", METHODS),
]


def test_the_loss_is_log_2_where_policy_and_reference_are_one(name: str, policy: LatentDiffusion) -> None:
    method = make_method(name, policy)
    for round_ in method.collect(0):
        loss = method.loss(round_.examples)
        assert loss.value.item() == pytest.approx(math.log(2), abs=1e-6)
        assert torch.equal(loss.log_ratio, torch.zeros(len(round_.examples), 2))


def test_an_epoch_has_as_many_rounds_as_it_says_and_a_later_one_begins_where_it_is_told(
    name: str, policy: LatentDiffusion
) -> None:
    method = make_method(name, policy)
    whole, rest = list(method.collect(0)), list(method.collect(0, skip=1))
    assert len(whole) == method.rounds_per_epoch == 3
    for one, other in zip(whole[1:], rest, strict=True):
        assert torch.equal(what_is_learned(one.examples), what_is_learned(other.examples))
        assert torch.equal(one.examples.t, other.examples.t)


def test_the_pairs_of_an_epoch_do_not_depend_on_the_size_of_a_round(name: str, policy: LatentDiffusion) -> None:
    def everything(size: int) -> torch.Tensor:
        rounds = make_method(name, policy, **batch_settings(name, size)).collect(0)
        pairs = torch.cat([what_is_learned(round_.examples).flatten(1) for round_ in rounds])
        return pairs[pairs[:, 0].argsort()]

    torch.testing.assert_close(everything(2), everything(5), rtol=1e-3, atol=1e-4)


def test_another_epoch_and_another_seed_give_other_noise(name: str, policy: LatentDiffusion) -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        pairs = next(iter(make_method(name, policy, seed=seed).collect(epoch))).examples
        return pairs.noise if name == "diffusion_dpo" else pairs.x_prev

    noises = [first(0, 0), first(0, 1), first(1, 0)]
    assert all(not torch.equal(a, b) for a, b in zip(noises, noises[1:] + noises[:1], strict=True))


def test_the_tallies_of_a_round_add_up(name: str, policy: LatentDiffusion) -> None:
    for round_ in make_method(name, policy).collect(0):
        assert sum(tally.num_kept for tally in round_.tallies) == len(round_.examples)
        assert {tally.t for tally in round_.tallies if tally.num_kept} == set(round_.examples.t.tolist())
        assert all(tally.num_kept <= tally.num_branched and 0 <= tally.margin <= 1 for tally in round_.tallies)


def test_swapping_win_and_lose_negates_the_logit(name: str, policy: LatentDiffusion) -> None:
    method = make_method(name, policy)
    pairs = next(iter(method.collect(0))).examples
    shake(policy)
    plain, other = method.loss(pairs), method.loss(swapped(pairs))
    assert plain.metrics["logit"] != 0
    torch.testing.assert_close(other.metrics["logit"], -plain.metrics["logit"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.log_ratio, plain.log_ratio.flip(1), rtol=1e-3, atol=1e-6)


def test_the_loss_is_the_mean_over_pairs(name: str, policy: LatentDiffusion) -> None:
    method = make_method(name, policy)
    pairs = next(iter(method.collect(0))).examples
    shake(policy)
    parts = [method.loss(pairs[index]).value for index in torch.arange(len(pairs)).split(1)]
    torch.testing.assert_close(method.loss(pairs).value, torch.stack(parts).mean(), rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_policy_alone_and_a_step_against_them_lowers_the_loss(
    name: str, policy: LatentDiffusion
) -> None:
    method = make_method(name, policy)
    pairs = next(iter(method.collect(0))).examples
    before = method.loss(pairs)
    before.value.backward()
    trained = policy.network.parameters()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    assert all(p.grad is None for p in policy.network.module.parameters() if not p.requires_grad)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    torch.optim.SGD(trained, lr=0.1 / norm.item()).step()
    assert method.loss(pairs).value < before.value
