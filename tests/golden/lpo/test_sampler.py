"""The published sampler with a latent preference model as scorer, step by step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spo.core.rollout import Segment, rollout
from spo.core.selection import select_pairs
from spo.core.threshold import rising_threshold, step_std
from spo.core.types import Conditioning
from spo.methods.sampled import keep_pairs
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.latent_score import LatentScorer
from tests.golden.lpo.conftest import assert_near, read
from tests.golden.lpo.policies import make_policy

Figures = dict[str, Tensor]
TRACES = {"trace": ("lrm_sd15", "unet_policy"), "trace_xl": ("lrm_sdxl", "lrm_sdxl/unet")}


class RecordedNoise:
    """The noise and the choices of a published run."""

    def __init__(self, figures: Figures, trace: str):
        self.figures, self.trace = figures, trace

    def normal(self, step: int, shape: tuple[int, ...]) -> Tensor:
        if step == -1:
            return self.figures[f"{self.trace}.step0.x_t"].unsqueeze(1)
        return self.figures[f"{self.trace}.step{step}.noise"].transpose(0, 1)

    def choice(self, step: int, k: int) -> Tensor:
        return self.figures[f"{self.trace}.step{step}.choice"]


def conditions(figures: Figures, trace: str) -> Conditioning:
    """What their policy attends to; the figures do not hold its own text encoders."""
    embeds = figures[f"{trace}.prompt_embeds"]
    if trace == "trace":
        negative = figures["trace.negative_prompt_embeds"].expand_as(embeds)
        return Conditioning({"prompt_embeds": embeds, "negative_prompt_embeds": negative})
    pooled = figures["trace_xl.pooled_prompt_embeds"]
    tensors = {"prompt_embeds": embeds, "pooled_embeds": pooled}
    return Conditioning({**tensors, **{f"negative_{name}": torch.zeros_like(each) for name, each in tensors.items()}})


@pytest.fixture(scope="module", params=TRACES)
def trace(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(trace: str, settings: dict[str, Any]) -> LatentDiffusion:
    model, unet = TRACES[trace]
    return make_policy(unet, model, settings[trace]["scheduler"], steps=settings[trace]["steps"])


@pytest.fixture(scope="module")
def segments(trace: str, policy: LatentDiffusion, figures: Figures, settings: dict[str, Any]) -> list[Segment]:
    preference = read(TRACES[trace][0])
    scorer = LatentScorer(preference, at_step_time=True)
    prompts = [
        preference.tokenizers[0].decode(ids, skip_special_tokens=True).strip() for ids in figures[f"{trace}.input_ids"]
    ]
    return list(
        rollout(
            policy,
            scorer,
            conditions(figures, trace),
            scorer.encode(prompts),
            candidates=settings[trace]["k"],
            first_step=0,
            branch_steps=1,
            noise=RecordedNoise(figures, trace),
        )
    )


def test_the_grid_is_the_published_one(trace: str, policy: LatentDiffusion, figures: Figures):
    assert torch.equal(policy.timesteps, figures[f"{trace}.timesteps"])


def test_each_steps_start_and_candidates_are_the_published_ones(trace: str, segments: list[Segment], figures: Figures):
    for i, segment in enumerate(segments):
        x_t, candidates = segment.latents
        assert_near(x_t[0], figures[f"{trace}.step{i}.x_t"])
        assert_near(candidates, figures[f"{trace}.step{i}.candidates"])


def test_scores_are_the_published_ones(trace: str, segments: list[Segment], figures: Figures):
    for i, segment in enumerate(segments):
        assert_near(segment.scores, figures[f"{trace}.step{i}.scores"])


def test_win_lose_and_keep_are_the_published_ones(
    trace: str, policy: LatentDiffusion, segments: list[Segment], figures: Figures, settings: dict[str, Any]
):
    """Their threshold is of the 20-step table, at t // 50, whatever the grid of the run."""
    sampler = policy.sampler
    twenty = torch.arange(951, 0, -50)
    given = settings[trace]
    std = step_std(sampler.schedule, twenty, eta=1.0)
    thresholds = rising_threshold(std, low=given["threshold_min"], high=given["threshold_max"]).flip(0)
    kept = []
    for i, segment in enumerate(segments):
        threshold = float(thresholds[int(segment.times[0]) // 50])
        selection = select_pairs(segment.scores, threshold=threshold)
        for name in ("win", "lose", "keep"):
            assert torch.equal(getattr(selection, name), figures[f"{trace}.step{i}.{name}"])
        kept += keep_pairs(segment, threshold=threshold).pairs
    returned = f"{trace}.out."
    assert_near(torch.cat([pairs.x_prev for pairs in kept]), figures[f"{returned}next_latents"])
    assert_near(torch.cat([pairs.x_t for pairs in kept]), figures[f"{returned}current_latents"])
    assert torch.equal(torch.cat([pairs.t for pairs in kept]), figures[f"{returned}timesteps"].flatten())


def test_only_the_path_that_goes_on_costs_a_pass_of_the_policy(trace: str, segments: list[Segment], figures: Figures):
    b = len(figures[f"{trace}.input_ids"])
    assert [segment.unet_forwards for segment in segments] == [b] * len(segments)
