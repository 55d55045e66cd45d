from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch

from spo.core.gaussian import log_prob
from spo.core.noise import KeyedNoise
from spo.core.rollout import rollout
from spo.core.schedule import RectifiedFlow, VariancePreserving
from spo.core.step import gaussian_step
from spo.core.types import Conditioning, Pairs
from spo.methods.sampled import keep_pairs
from tests.schedules import grid, stable_diffusion

NUM_STEPS, LATENT = 10, (2, 3, 3)


class AnalyticDenoiser:
    """The exact epsilon of data that is N(prompt, 1) everywhere; remembers what it was asked."""

    def __init__(self):
        self.timesteps = grid(NUM_STEPS)
        self.num_trainable = NUM_STEPS
        self.latent_shape = LATENT
        self.alpha_bar = stable_diffusion().alpha_bar
        self.decoded = 0
        self.calls = []  # (x_t, t) of every predict

    def encode(self, prompts):
        return Conditioning({"prompt": torch.tensor([float(prompt) for prompt in prompts])})

    def predict(self, x_t, t, cond):
        assert len(x_t) == len(t) == len(cond)
        self.calls.append((x_t, t))
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * cond.tensors["prompt"].view(-1, 1, 1, 1))

    def transition(self, output, x_t, t, t_prev, *, eta=None):
        options = {"eta": 1.0 if eta is None else eta, "prediction_type": "epsilon"}
        return gaussian_step(output, x_t, t, t_prev, schedule=VariancePreserving(self.alpha_bar), **options)

    def decode(self, latents):
        self.decoded += len(latents)
        return latents.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)

    def reference(self):
        return nullcontext()


class AnalyticFlow(AnalyticDenoiser):
    """The exact velocity of the same data; its last step has no density."""

    def __init__(self):
        super().__init__()
        self.timesteps = torch.linspace(1000, 100, NUM_STEPS)
        self.num_trainable = NUM_STEPS - 1

    def predict(self, x_t, t, cond):
        self.calls.append((x_t, t))
        mean, sigma = cond.tensors["prompt"].view(-1, 1, 1, 1), (t / 1000).view(-1, 1, 1, 1)
        x_0 = mean + (1 - sigma) * (x_t - (1 - sigma) * mean) / ((1 - sigma) ** 2 + sigma**2)
        return (x_t - x_0) / sigma

    def transition(self, output, x_t, t, t_prev, *, eta=None):
        options = {"eta": 1.0 if eta is None else eta, "prediction_type": "flow"}
        return gaussian_step(output, x_t, t, t_prev, schedule=RectifiedFlow(), **options)


class BrightnessScorer:
    """Brighter (or, with sign -1, darker) is better; remembers what it was shown."""

    def __init__(self, sign=1.0):
        self.sign = sign
        self.calls = []  # (images (k * b, 3, h, w), text (k * b, 1), t)

    def encode(self, prompts):
        return torch.tensor([[float(prompt)] for prompt in prompts])

    def __call__(self, candidates):
        images, k = candidates.images.flatten(0, 1), len(candidates.x)
        self.calls.append((images, candidates.text.repeat(k, 1), torch.tensor(candidates.t)))
        return self.sign * 20 * images.mean(dim=(1, 2, 3)).unflatten(0, (k, -1))


class LatentScorer(BrightnessScorer):
    """Scores the noisy latents themselves; asks for nothing else."""

    def __init__(self):
        super().__init__()
        self.started = []  # the time that each candidate's last step started from

    def __call__(self, candidates):
        self.calls.append((candidates.x, candidates.text, candidates.t))
        self.started.append(candidates.t_from)
        return self.sign * 20 * candidates.x.mean(dim=(2, 3, 4))


def run(policy=None, scorer=None, prompts=(-1, 0, 1), ids=None, **options):
    policy, scorer = policy or AnalyticDenoiser(), scorer or BrightnessScorer()
    settings = {"candidates": 4, "first_step": 2, "branch_steps": 1, **options}
    selection = {"threshold": settings.pop("threshold", 0.0), "at_random": settings.pop("at_random", False)}
    noise = KeyedNoise(0, 0, ids or range(len(prompts)))
    segments = rollout(policy, scorer, policy.encode(prompts), scorer.encode(prompts), noise=noise, **settings)
    return [Kept(segment, keep_pairs(segment, **selection)) for segment in segments]


class Kept:
    """A segment and its kept pairs."""

    def __init__(self, segment, kept):
        self.t = segment.times[0]
        self.unet_forwards = segment.unet_forwards
        self.pairs, self.num_branched, self.num_kept = kept.pairs, kept.num_branched, kept.num_kept
        self.score, self.margin = kept.score, kept.margin


def test_every_step_from_first_step_on_branches_every_prompt():
    segments = run()
    assert [segment.t for segment in segments] == [701, 601, 501, 401, 301, 201, 101, 1]
    assert all(segment.num_branched == segment.num_kept == 3 for segment in segments)
    assert all(len(segment.pairs) == 1 and len(segment.pairs[0]) == 3 for segment in segments)


def test_pairs_hold_their_timesteps_and_the_last_ends_at_0():
    pairs = Pairs.cat([pairs for segment in run() for pairs in segment.pairs])
    assert pairs.t.unique().tolist() == [1, 101, 201, 301, 401, 501, 601, 701]
    assert torch.equal(pairs.t_prev, (pairs.t - 100).clamp(min=0))


def test_a_shared_x_t_is_the_parent_of_both_win_and_lose():
    """Both must be mean + std * noise with the noise that was drawn for that step."""
    policy = AnalyticDenoiser()
    noise = KeyedNoise(0, 0, range(3))
    for i, segment in enumerate(run(policy), start=2):
        (pairs,) = segment.pairs
        assert pairs.x_t.shape == (3, 1, *LATENT)
        x_t = pairs.x_t[:, 0]
        transition = policy.transition(policy.predict(x_t, pairs.t, pairs.cond), x_t, pairs.t, pairs.t_prev)
        drawn = noise.normal(i, (4, *LATENT))
        for x_prev in pairs.x_prev.unbind(dim=1):
            used = ((x_prev - transition.mean) / transition.std).unsqueeze(1)
            distance = (used - drawn).abs().amax(dim=(2, 3, 4))  # (b, k)
            assert (distance.min(dim=1).values < 1e-3).all()


def test_log_prob_of_every_pair_is_finite():
    policy = AnalyticDenoiser()
    for segment in run(policy):
        (pairs,) = segment.pairs
        x_t = pairs.x_t[:, 0]
        output = policy.predict(x_t, pairs.t, pairs.cond)
        assert log_prob(policy.transition(output, x_t, pairs.t, pairs.t_prev), pairs.x_prev).isfinite().all()


def test_candidates_are_scored_by_their_own_x_0_at_the_next_timestep_and_the_last_as_they_are():
    policy, scorer = AnalyticDenoiser(), BrightnessScorer()
    cond = policy.encode((-1, 0, 1))
    segments = run(policy, scorer)
    assert [t.unique().tolist() for _, _, t in scorer.calls] == [[601], [501], [401], [301], [201], [101], [1], [0]]
    for segment, (images, text, t) in zip(segments, scorer.calls, strict=True):
        assert text.flatten().tolist() == [-1, 0, 1] * 4
        win = segment.pairs[0].x_prev[:, 0]
        if t > 0:
            t = t.expand(3)
            win = policy.transition(policy.predict(win, t, cond), win, t, (t - 100).clamp(min=0)).x_0
        best = images.unflatten(0, (4, 3)).mean(dim=(2, 3, 4)).max(dim=0).values
        torch.testing.assert_close(policy.decode(win).mean(dim=(1, 2, 3)), best)


def test_the_win_scores_higher_and_the_margin_is_that_of_the_scores():
    scorer = BrightnessScorer()
    for segment, (images, _, _) in zip(run(scorer=scorer), scorer.calls, strict=True):
        scores = 20 * images.mean(dim=(1, 2, 3)).unflatten(0, (4, 3))
        expected = torch.tanh((scores.max(dim=0).values - scores.min(dim=0).values) / 2)
        torch.testing.assert_close(segment.pairs[0].margin, expected)
        assert segment.margin == pytest.approx(expected.mean().item())
        assert segment.score == pytest.approx(scores.mean().item(), abs=1e-4)


def test_candidates_are_scored_by_what_a_look_ahead_without_noise_predicts():
    policy, scorer = AnalyticDenoiser(), BrightnessScorer()
    cond = policy.encode((-1, 0, 1))
    segments = run(policy, scorer, look_ahead=2)
    # from 601 seven steps are left, with stops after 2 and 5 of them; from 101 there is one stop, from 1 none
    assert [int(t) for _, _, t in scorer.calls] == [101, 101, 101, 1, 1, 1, 1, 0]
    first = [601, 401, 101]  # of the first candidates
    for number, stops in ((0, first), (5, [101, 1]), (6, [1]), (7, [])):
        win = segments[number].pairs[0].x_prev[:, 0]
        for t, t_prev in pairwise([*stops, 0] if stops else []):
            now, then = (torch.full((3,), each) for each in (t, t_prev))
            step = policy.transition(policy.predict(win, now, cond), win, now, then, eta=0.0)
            win = step.mean if t_prev else step.x_0
        best = scorer.calls[number][0].unflatten(0, (4, 3)).mean(dim=(2, 3, 4)).max(dim=0).values
        torch.testing.assert_close(policy.decode(win).mean(dim=(1, 2, 3)), best)


def test_a_look_ahead_costs_its_steps_and_changes_no_candidate():
    plain, ahead = run(), run(look_ahead=2)
    for number, (one, other) in enumerate(zip(plain, ahead, strict=True)):
        assert torch.equal(one.pairs[0].x_t, other.pairs[0].x_t)
        further = min(2, max(0, 6 - number))  # steps of the grid that are left after the candidates' own, at most 2
        assert other.unet_forwards - one.unet_forwards == 12 * further


def test_only_margins_above_the_threshold_are_kept():
    everything, some = run(prompts=range(20)), run(prompts=range(20), threshold=0.9)
    for all_of, kept in zip(everything, some, strict=True):
        above = all_of.pairs[0].margin > 0.9
        assert kept.num_kept == len(kept.pairs[0]) == above.sum()
        assert torch.equal(kept.pairs[0].x_prev, all_of.pairs[0].x_prev[above])
        assert torch.equal(kept.pairs[0].cond.tensors["prompt"], torch.arange(20.0)[above])
    assert 0 < sum(segment.num_kept for segment in some) < 20 * 8


def test_a_segment_may_keep_nothing():
    segments = run(threshold=1.0)
    assert [segment.num_kept for segment in segments] == [0] * 8
    assert segments[0].pairs[0].x_prev.shape == (0, 2, *LATENT)
    assert segments[0].margin > 0


@pytest.mark.parametrize("branch_steps", [1, 2, 8])
def test_no_latent_passes_through_the_policy_twice(branch_steps):
    policy = AnalyticDenoiser()
    segments = run(policy, branch_steps=branch_steps)
    assert [len(x_t) for x_t, _ in policy.calls] == [3, 3, 3] + [12] * 7
    assert [t[0] for _, t in policy.calls] == policy.timesteps.tolist()
    assert sum(segment.unet_forwards for segment in segments) == 3 * 3 + 12 * 7
    latents = torch.cat([x_t for x_t, _ in policy.calls]).flatten(1)
    assert len(latents.unique(dim=0)) == len(latents)


def test_a_scorer_of_latents_costs_one_pass_a_step_and_no_decode():
    """Only the candidate that sampling continues from goes through the policy; the path is the same as any scorer's."""
    policy, scorer = AnalyticDenoiser(), LatentScorer()
    segments = run(policy, scorer)
    assert [len(x_t) for x_t, _ in policy.calls] == [3] * NUM_STEPS
    assert policy.decoded == 0
    assert [t for _, _, t in scorer.calls] == [601, 501, 401, 301, 201, 101, 1, 0]
    assert all(x.shape == (4, 3, *LATENT) for x, _, _ in scorer.calls)
    for segment, of_pixels in zip(segments, run(), strict=True):
        torch.testing.assert_close(segment.pairs[0].x_t, of_pixels.pairs[0].x_t)


@pytest.mark.parametrize(("branch_steps", "started"), [(1, [701, 601, 501, 401, 301, 201, 101, 1]), (4, [401, 1])])
def test_candidates_know_the_time_that_their_last_step_started_from(branch_steps, started):
    scorer = LatentScorer()
    run(scorer=scorer, branch_steps=branch_steps)
    assert scorer.started == started


@pytest.mark.parametrize(
    ("branch_steps", "scored_at", "pairs_from"),
    [(1, [700, 600, 500, 400, 300, 200, 100], [800, 700, 600, 500, 400, 300, 200]), (4, [400, 0], [800, 400])],
)
def test_a_flows_last_step_is_taken_but_makes_no_pair(branch_steps, scored_at, pairs_from):
    policy, scorer = AnalyticFlow(), LatentScorer()
    segments = run(policy, scorer, branch_steps=branch_steps)
    assert [round(t) for _, _, t in scorer.calls] == scored_at
    assert [round(segment.t) for segment in segments] == pairs_from
    pairs = [pairs for segment in segments for pairs in segment.pairs]
    assert [round(float(each.t[0])) for each in pairs] == [800, 700, 600, 500, 400, 300, 200]
    for each in pairs:
        x_t = each.x_t[:, 0]
        output = policy.predict(x_t, each.t, each.cond)
        assert log_prob(policy.transition(output, x_t, each.t, each.t_prev), each.x_prev[:, 0]).isfinite().all()


def test_all_noise_is_fresh_in_a_flows_first_step():
    (first, *_) = run(AnalyticFlow(), first_step=0)
    assert first.pairs[0].t.tolist() == [1000.0] * 3
    assert first.pairs[0].x_prev.isfinite().all()


def test_each_x_t_was_a_candidate_of_the_segment_before():
    policy = AnalyticDenoiser()
    segments = run(policy)
    for segment, (candidates, t) in zip(segments[1:], policy.calls[3:], strict=True):
        (pairs,) = segment.pairs
        assert pairs.t[0] == t[0]
        same = (candidates.unflatten(0, (4, 3)) == pairs.x_t[:, 0]).all(dim=(2, 3, 4))  # (k, b)
        assert same.sum(dim=0).tolist() == [1, 1, 1]


def test_a_random_continuation_never_sees_scores():
    bright, dark = AnalyticDenoiser(), AnalyticDenoiser()
    of_bright, of_dark = run(bright, BrightnessScorer()), run(dark, BrightnessScorer(sign=-1.0))
    for (x_t, t), (same_x_t, same_t) in zip(bright.calls, dark.calls, strict=True):
        assert torch.equal(x_t, same_x_t)
        assert torch.equal(t, same_t)
    for segment, mirrored in zip(of_bright, of_dark, strict=True):
        assert torch.equal(segment.pairs[0].x_t, mirrored.pairs[0].x_t)
        assert torch.equal(segment.pairs[0].x_prev, mirrored.pairs[0].x_prev.flip(1))


@pytest.mark.parametrize(("continue_from", "index"), [("win", 0), ("lose", 1)])
def test_the_ablations_continue_from_the_win_or_the_lose(continue_from, index):
    segments = run(continue_from=continue_from)
    for before, after in pairwise(segments):
        assert torch.equal(after.pairs[0].x_t[:, 0], before.pairs[0].x_prev[:, index])


def test_random_pairing_is_of_two_candidates_drawn_without_scores_and_still_ordered_by_them():
    two, best_worst = run(at_random=True), run()
    mirrored = run(scorer=BrightnessScorer(sign=-1.0), at_random=True)
    for segment, flipped, widest in zip(two, mirrored, best_worst, strict=True):
        assert torch.equal(segment.pairs[0].x_prev, flipped.pairs[0].x_prev.flip(1))
        assert torch.equal(segment.pairs[0].x_t, widest.pairs[0].x_t)
        assert (segment.pairs[0].margin <= widest.pairs[0].margin).all()


def test_a_segment_of_several_steps_gives_a_pair_a_step_along_unbroken_paths():
    segments = run(branch_steps=4)
    assert [segment.t for segment in segments] == [701, 301]
    for segment in segments:
        assert [pairs.x_t.shape[1] for pairs in segment.pairs] == [1, 2, 2, 2]
        assert [int(pairs.t[0]) for pairs in segment.pairs] == [segment.t - 100 * j for j in range(4)]
        for before, after in pairwise(segment.pairs):
            assert torch.equal(before.x_prev, after.x_t)
            assert torch.equal(before.t_prev, after.t)
            assert torch.equal(before.margin, after.margin)


def test_a_segment_of_several_steps_is_scored_once_at_its_end():
    scorer = BrightnessScorer()
    run(scorer=scorer, branch_steps=4)
    assert [t.unique().tolist() for _, _, t in scorer.calls] == [[301], [0]]


def test_the_next_segment_continues_from_the_end_of_a_path():
    first, second = run(branch_steps=4, continue_from="win")
    assert torch.equal(second.pairs[0].x_t[:, 0], first.pairs[-1].x_prev[:, 0])


def test_a_prompts_pairs_do_not_depend_on_its_batch():
    together = run(prompts=(-1, 0, 1), ids=(5, 6, 7))
    alone = run(prompts=(0,), ids=(6,))
    for segment, one in zip(together, alone, strict=True):
        torch.testing.assert_close(segment.pairs[0].x_prev[1:2], one.pairs[0].x_prev)
        torch.testing.assert_close(segment.pairs[0].margin[1:2], one.pairs[0].margin)


def test_branching_leaves_the_distribution_of_samples_alone():
    """A uniformly drawn candidate is an ancestral sample; here each step is linear, which gives their variance."""
    policy = AnalyticDenoiser()
    grid, variance = [*policy.timesteps.tolist(), 0], 1.0
    for t, t_prev in pairwise(grid):
        one, zero, ts = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([[t], [t_prev]])
        step = policy.transition(policy.predict(one, ts[0], policy.encode([0])), one, *ts)
        at_zero = policy.transition(policy.predict(zero, ts[0], policy.encode([0])), zero, *ts)
        variance = float((step.mean - at_zero.mean) ** 2 * variance + step.std**2)
    last = run(prompts=(3,) * 400, candidates=2)[-1].pairs[0].x_prev  # of k = 2, all
    assert last.mean() == pytest.approx(3, abs=0.1)
    assert last.std() == pytest.approx(variance**0.5, abs=0.03)


def test_gradients_are_off_inside_and_as_they_were_outside():
    policy, scorer = AnalyticDenoiser(), BrightnessScorer()
    policy.alpha_bar.requires_grad_()
    segments = rollout(
        policy,
        scorer,
        policy.encode((0,)),
        scorer.encode((0,)),
        candidates=2,
        first_step=2,
        branch_steps=1,
        noise=KeyedNoise(0, 0, [0]),
    )
    for segment in segments:
        assert torch.is_grad_enabled()
        assert not segment.latents[1].requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 1}, "candidates=1 make no pair; use 2 or more"),
        ({"first_step": 10}, r"first_step=10 must lie in \[0, 10\)"),
        ({"policy": AnalyticFlow(), "first_step": 9}, r"first_step=9 must lie in \[0, 9\), the steps with a density"),
        ({"branch_steps": 3}, r"branch_steps=3 must divide steps - first_step = 8; use one of \[1, 2, 4, 8\]"),
        ({"continue_from": "best"}, "continue_from='best' is unknown; use random, win or lose"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
