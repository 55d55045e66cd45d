"""D3PO's pairs are steps of whole trajectories; one score of the ends labels them all."""

import torch

from spo.models.latent_diffusion import LatentDiffusion
from tests.methods.tiny import BrightnessScorer, make_method


def test_a_pair_of_trajectories_starts_from_one_noise_and_follows_its_own_steps(policy: LatentDiffusion) -> None:
    pairs = next(iter(make_method("d3po", policy, prompts_per_rollout=1).collect(0))).examples
    assert pairs.t.tolist() == policy.timesteps.tolist()
    assert torch.equal(pairs.x_t[0, 0], pairs.x_t[0, 1])
    assert not torch.equal(pairs.x_prev[0, 0], pairs.x_prev[0, 1])
    assert torch.equal(pairs.x_t[1:], pairs.x_prev[:-1])


def test_every_step_of_the_brighter_image_is_a_win(policy: LatentDiffusion) -> None:
    for round_ in make_method("d3po", policy, prompts_per_rollout=1).collect(0):
        pairs = round_.examples
        ends = pairs.x_prev[pairs.t == policy.timesteps[-1]][0]  # (2, c, h, w)
        win, lose = policy.decode(ends).mean(dim=(1, 2, 3))  # the scorer prefers bright images
        assert win > lose
        assert len(pairs.margin.unique()) == 1


def test_the_ends_are_scored_as_clean_images(policy: LatentDiffusion) -> None:
    method = make_method("d3po", policy)
    times = []

    class Listener(BrightnessScorer):
        def __call__(self, candidates):
            times.append(candidates.t)
            return super().__call__(candidates)

    method.scorer = Listener()
    list(method.collect(0))
    assert times == [0] * method.rounds_per_epoch
