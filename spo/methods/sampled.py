"""What SPO and D3PO share: pairs out of rollouts of the policy, and the loss on their steps' densities.

One epoch samples each training prompt once, a batch of prompts at a time; the pairs of a batch are trained on at
once, so that the next batch is sampled by the policy as it has become.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor

from spo import distributed
from spo.config import SampledConfig
from spo.core.gaussian import log_prob
from spo.core.losses import dpo_loss, log_ratio
from spo.core.noise import KeyedNoise
from spo.core.rollout import Segment
from spo.core.types import Conditioning, Denoiser, Loss, Pairs, Scorer
from spo.methods.method import Round, Tally

Roll = Callable[[Conditioning, Tensor, KeyedNoise], Iterator[Segment]]


def rounds_per_epoch(config: SampledConfig, prompts: Sequence[str]) -> int:
    """As many as it takes to see every prompt once, or fewer where that is asked for."""
    whole = -(-len(prompts) // config.prompts_per_rollout)
    return min(config.rollouts_per_epoch or whole, whole)


def sampled_rounds(
    config: SampledConfig,
    policy: Denoiser,
    scorer: Scorer,
    prompts: Sequence[str],
    roll: Roll,
    *,
    seed: int,
    epoch: int,
    skip: int,
) -> Iterator[Round[Pairs]]:
    """The pairs of each batch of prompts, which `roll` samples; a prompt is known by its index in `prompts`.

    Of several processes each samples its share of the batch; all get all pairs.
    """
    order = torch.randperm(len(prompts), generator=Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    size = config.prompts_per_rollout
    for number in range(skip, rounds_per_epoch(config, prompts)):
        chosen = order[number * size : (number + 1) * size]
        mine = chosen[distributed.share(len(chosen))]
        here = mine or chosen[:1]  # one without a prompt samples another's, and what it found is dropped
        batch = [prompts[i] for i in here]
        noise = KeyedNoise(seed, epoch, here, policy.timesteps.device)
        cond, text = policy.encode(batch), scorer.encode(batch)
        with policy.merged():
            segments = list(roll(cond, text, noise))
        yield to_round([gathered(segment, drop=not mine) for segment in segments], policy.timesteps.tolist())


def gathered(segment: Segment, *, drop: bool) -> Segment:
    """The segment of all processes' prompts, in the prompts' order; this one's own are left out if `drop`."""
    if distributed.count() == 1:
        return segment
    weight = 0 if drop else segment.num_branched
    sums = distributed.add_up(
        {
            "branched": weight,
            "kept": 0 if drop else segment.num_kept,
            "score": segment.score * weight,
            "margin": segment.margin * weight,
            "forwards": segment.unet_forwards,
        }
    )
    return Segment(
        pairs=tuple((pairs[:0] if drop else pairs).map(distributed.gather) for pairs in segment.pairs),
        t=segment.t,
        num_branched=int(sums["branched"]),
        num_kept=int(sums["kept"]),
        score=sums["score"] / sums["branched"],
        margin=sums["margin"] / sums["branched"],
        unet_forwards=int(sums["forwards"]),
    )


def to_round(segments: Sequence[Segment], grid: Sequence[int]) -> Round[Pairs]:
    """The kept pairs of one batch of prompts; a segment's tally counts for each of its steps."""
    kept = [pairs for segment in segments for pairs in segment.pairs if len(pairs)]
    branched = sum(segment.num_branched for segment in segments)
    measured = {
        "kept": sum(segment.num_kept for segment in segments) / branched,
        "margin": sum(segment.margin for segment in segments) / len(segments),
        "score": sum(segment.score for segment in segments) / len(segments),
    }
    tallies = [
        Tally(grid[grid.index(segment.t) + j], segment.num_branched, segment.num_kept, segment.margin)
        for segment in segments
        for j in range(len(segment.pairs))
    ]
    return Round(Pairs.cat(kept) if kept else None, tallies, measured)


def step_loss(policy: Denoiser, pairs: Pairs, *, beta: float, clip_range: float | None) -> Loss:
    """DPO's loss on the clamped ratios of policy and reference, of the densities of single steps.

    The reference is the policy with its adapter off. Metrics are dpo_loss's and `clipped`, the share of ratios at
    the clamp, which have no gradient.
    """
    log_p = step_log_prob(policy, pairs)
    with torch.no_grad(), policy.reference():
        log_p_ref = step_log_prob(policy, pairs)
    ratio = log_ratio(log_p, log_p_ref, clip_range=clip_range)
    loss = dpo_loss(ratio, beta=beta)
    clipped = (ratio != log_p - log_p_ref).float().mean()
    return Loss(loss.value, {**loss.metrics, "clipped": clipped.detach()}, loss.log_ratio)


def step_log_prob(policy: Denoiser, pairs: Pairs) -> Tensor:
    """log p(x_prev | x_t) of win and lose (n, 2), means over (c, h, w); where they share x_t, of one forward."""
    width = pairs.x_t.shape[1]
    x_t = pairs.x_t.flatten(0, 1)  # (n * width, c, h, w)
    t, t_prev = pairs.t.repeat_interleave(width), pairs.t_prev.repeat_interleave(width)
    cond = pairs.cond if width == 1 else pairs.cond.repeat_interleave(width)
    return log_prob(policy.transition(policy.predict(x_t, t, cond), x_t, t, t_prev), pairs.x_prev)
