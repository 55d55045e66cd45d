"""Whether a preference model orders the candidates of one x_t as an independent metric does.

That is what SPO asks of it. Accuracy on pairs of different images says little about this, because such pairs differ in
much more than the candidates of one x_t.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spo.config import CandidatesConfig
from spo.core.noise import KeyedNoise
from spo.core.rollout import rollout
from spo.core.selection import select_pairs, take
from spo.core.types import Candidates, Conditioning, Scorer
from spo.evaluation.statistics import mean_interval
from spo.metrics.metric import build_metrics, score
from spo.models.latent_diffusion import LatentDiffusion
from spo.runtime import distributed

Row = dict[str, Any]


def candidate_agreement(
    base: LatentDiffusion, scorer: Scorer, prompts: Sequence[str], settings: CandidatesConfig, *, seed: int
) -> list[Row]:
    """Rows of timestep, agreement, low, high and n, from the noisiest time to 0; no row if the metric has no weights.

    The base is sampled once for each prompt as in SPO; every step draws candidates. Where the metric prefers the
    model's best candidate to its worst, they agree; equal scores count half, so chance is 0.5. Intervals (95%) are over
    prompts. The metric scores the predicted x_0 or, with `look_ahead`, the end of deterministic sampling from the
    candidate.
    """
    metrics = build_metrics([settings.metric], base.device, needed=())
    if not metrics:
        return []
    prompts = list(prompts[: settings.num_prompts])
    is_shared = len(prompts) >= distributed.count()
    ids = range(len(prompts))[distributed.share(len(prompts)) if is_shared else slice(None)]
    own = [prompts[i] for i in ids]
    cond = base.encode(own)
    extremes = _Extremes(scorer)
    noise = KeyedNoise(seed, 0, ids, base.device)
    options: dict[str, Any] = {"candidates": settings.num_candidates, "first_step": 0, "branch_steps": 1}
    for _ in rollout(base, extremes, cond, extremes.encode(own), noise=noise, **options):
        pass
    agreements = []
    for i, pair in enumerate(extremes.found):
        images = base.decode(_ends(base, pair.flatten(0, 1), i + 1, cond.repeat(2), look_ahead=settings.look_ahead))
        win, lose = score(metrics, images, own * 2)[settings.score].chunk(2)
        agreements.append((win - lose).sign() / 2 + 0.5)
    table = torch.stack(agreements, dim=1)  # (b, T)
    table = distributed.gather(table) if is_shared else table
    times = [*base.timesteps.tolist()[1:], 0][: base.num_trainable]
    rows = []
    for t, values in zip(times, table.unbind(1), strict=True):
        found = mean_interval(values.numpy(), prompts)
        rows.append({"timestep": t, "agreement": found.mean, "low": found.low, "high": found.high, "n": found.n})
    return rows


class _Extremes:
    """A scorer that keeps the best and the worst of the candidates that it scores."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer
        self.found: list[Tensor] = []  # of each step, (2, b, c, h, w): best and worst

    def encode(self, prompts: Sequence[str]) -> Any:
        return self.scorer.encode(prompts)

    def __call__(self, candidates: Candidates) -> Tensor:
        scores = self.scorer(candidates)
        selection = select_pairs(scores, threshold=0.0)
        self.found.append(torch.stack([take(candidates.x, selection.win), take(candidates.x, selection.lose)]))
        return scores


@torch.no_grad()
def _ends(base: LatentDiffusion, x: Tensor, step: int, cond: Conditioning, *, look_ahead: bool) -> Tensor:
    """Clean latents (n, c, h, w) of x (n, c, h, w) at grid step `step`: its predicted x_0, or the end of sampling."""
    sampler, grid = replace(base.sampler, eta=0.0), [*base.timesteps.tolist(), 0]
    for t, t_prev in zip(grid[step:], grid[step + 1 :], strict=False):
        times, times_prev = (torch.full((len(x),), at, device=x.device) for at in (t, t_prev))
        transition = sampler.transition(base.predict(x, times, cond), x, times, times_prev)
        if not look_ahead:
            return transition.x_0
        x = transition.mean
    return x
