"""Diffusion-DPO's objective against one written out by hand, and what it makes of its data."""

import math
from dataclasses import replace

import pytest
import torch

from spo.methods.diffusion_dpo import DiffusionDpo
from spo.models.latent_diffusion import LatentDiffusion
from tests.methods.tiny import LABELS, data, make_method
from tests.models.tiny import make_tiny_denoiser, shake, with_sampling


def test_the_objective_is_the_published_one_in_float64(policy: LatentDiffusion, folder) -> None:
    unguided = with_sampling(policy, guidance_scale=1.0)
    method = make_method("diffusion_dpo", unguided, beta=700.0, batch_size=5)
    pairs = next(iter(method.collect(0))).examples
    shake(policy)
    reference = make_tiny_denoiser("sd15", folder)

    logits = []
    for i in range(len(pairs)):
        alpha_bar = policy.sampler.schedule.alpha_bar.double()[pairs.t[i]]
        text = pairs.cond.tensors["prompt_embeds"][i : i + 1]
        noise = pairs.noise[i].double()

        def error(unet, x_0, alpha_bar=alpha_bar, noise=noise, text=text, t=pairs.t[i]):
            x_t = alpha_bar.sqrt() * x_0.double() + (1 - alpha_bar).sqrt() * noise
            with torch.no_grad():
                output = unet(x_t[None].float(), t, encoder_hidden_states=text).sample[0]
            return ((output.double() - noise) ** 2).mean()

        win, lose = pairs.x_0[i]
        of_policy = error(policy.network.module, win) - error(policy.network.module, lose)
        of_reference = error(reference.network.module, win) - error(reference.network.module, lose)
        logits.append(-0.5 * 700.0 * (of_policy - of_reference).item())

    expected = sum(math.log1p(math.exp(-logit)) for logit in logits) / len(logits)
    loss = method.loss(pairs)
    assert loss.value.item() == pytest.approx(expected, rel=1e-3)
    assert loss.metrics["logit"].item() == pytest.approx(sum(logits) / len(logits), rel=1e-3, abs=1e-4)


def test_ties_are_dropped_and_the_larger_label_wins(policy: LatentDiffusion) -> None:
    latents = data(policy).latents()
    rounds = list(make_method("diffusion_dpo", policy).collect(0))
    seen = {tuple(pair[:, 0, 0, 0].tolist()) for round_ in rounds for pair in round_.examples.x_0}
    wanted = set()
    for (first, second), (a, b) in zip(latents[:, :, 0, 0, 0].tolist(), LABELS, strict=True):
        if a != b:
            wanted.add((first, second) if a > b else (second, first))
    assert seen == wanted


def test_pairs_of_which_none_is_decided_are_refused(policy: LatentDiffusion) -> None:
    pairs = data(policy)
    config = make_method("diffusion_dpo", policy).config
    with pytest.raises(ValueError, match="all of 6 pairs are ties"):
        DiffusionDpo(config, policy, replace(pairs, label=torch.full_like(pairs.label, 0.5)))


def test_win_and_lose_share_noise_and_timestep_which_cover_the_schedule(policy: LatentDiffusion) -> None:
    method = make_method("diffusion_dpo", policy, batch_size=5)
    t = torch.cat([next(iter(method.collect(epoch))).examples.t for epoch in range(200)])
    assert t.min() >= 0 and t.max() < 1000
    assert abs(t.float().mean().item() - 499.5) < 4 * 288.7 / math.sqrt(len(t))
    pairs = next(iter(method.collect(0))).examples
    assert pairs.noise.shape == (5, *policy.latent_shape)  # one a pair


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (1.0, 5)])
def test_captions_are_dropped_by_their_share(policy: LatentDiffusion, share: float, dropped: int) -> None:
    method = make_method("diffusion_dpo", policy, batch_size=5, empty_captions=share)
    embedded = next(iter(method.collect(0))).examples.cond.tensors["prompt_embeds"]
    empty = policy.encode([""]).tensors["prompt_embeds"]
    assert sum(torch.allclose(row, empty[0], rtol=1e-4, atol=1e-4) for row in embedded) == dropped


def test_an_update_takes_four_forwards_a_pair(policy: LatentDiffusion) -> None:
    unguided = with_sampling(policy, guidance_scale=1.0)
    method = make_method("diffusion_dpo", unguided, batch_size=5)
    pairs = next(iter(method.collect(0))).examples
    before = unguided.network.forwards
    method.loss(pairs)
    assert unguided.network.forwards - before == 4 * len(pairs)  # win and lose, policy and reference


def test_captions_follow_their_pairs(policy: LatentDiffusion) -> None:
    method = make_method("diffusion_dpo", policy, batch_size=5, empty_captions=0.0)
    pairs = next(iter(method.collect(0))).examples
    latents, captions = data(policy).latents(), data(policy).captions
    for x_0, embedded in zip(pairs.x_0, pairs.cond.tensors["prompt_embeds"], strict=True):
        i = next(i for i in range(len(latents)) if (latents[i] == x_0[0]).all(dim=(1, 2, 3)).any())
        expected = policy.encode([captions[i]]).tensors["prompt_embeds"][0]
        torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-4)


def test_pairs_of_several_sizes_are_each_visited_once_with_one_size_in_an_update(policy: LatentDiffusion) -> None:
    pairs, (channels, height, width) = data(policy), policy.latent_shape
    wide = torch.randn(6, channels, height, 2 * width, generator=torch.Generator().manual_seed(8))
    bucket = torch.tensor([0, 1, 0, 1, 1, 0])
    members = pairs.members.clone()
    members[bucket == 1] = torch.arange(6).view(3, 2)
    several = replace(pairs, pictures={0: pairs.pictures[0], 1: wide}, bucket=bucket, members=members)
    method = DiffusionDpo(make_method("diffusion_dpo", policy).config, policy, several)
    rounds = list(method.collect(0))
    assert len(rounds) == method.rounds_per_epoch == 3  # of the 2 and 3 decided pairs, two at a time
    seen = [tuple(pair[:, 0, 0, 0].tolist()) for round_ in rounds for pair in round_.examples.x_0]
    decided = [i for i, (a, b) in enumerate(LABELS) if a != b]
    wanted = {tuple(several.latents(torch.tensor([i]))[0, :, 0, 0, 0].tolist()) for i in decided}
    assert len(seen) == 5 and {frozenset(pair) for pair in seen} == {frozenset(pair) for pair in wanted}
    assert {round_.examples.x_0.shape[-1] for round_ in rounds} == {width, 2 * width}
    for round_ in rounds:
        assert method.loss(round_.examples).value.isfinite()
    skipped = list(method.collect(0, skip=1))
    assert torch.equal(skipped[0].examples.x_0, rounds[1].examples.x_0)
