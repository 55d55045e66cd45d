"""What SPO and D3PO share: pairs out of rollouts of the policy, and the loss on their steps' densities.

One epoch samples each training prompt once, a batch of prompts at a time; the pairs of a batch are trained on at
once, so that the next batch is sampled by the policy as it has become.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor

from spo.config import SampledConfig
from spo.core.gaussian import log_prob
from spo.core.losses import dpo_loss, log_ratio
from spo.core.noise import KeyedNoise, epoch_seed
from spo.core.rollout import Segment
from spo.core.types import Conditioning, Denoiser, Loss, Pairs, Scorer
from spo.methods.method import Round, Tally
from spo.runtime import distributed

C = TypeVar("C", bound=SampledConfig)


class SampledMethod(ABC, Generic[C]):
    """What such a method collects and what it minimises, up to how it rolls out.

    prompts: the training prompts; a prompt is known by its index in them, to which all its noise is keyed.
    """

    def __init__(self, config: C, policy: Denoiser, scorer: Scorer, prompts: Sequence[str], *, seed: int = 0):
        self.config = config
        self.policy = policy
        self.scorer = scorer
        self.prompts = list(prompts)
        self.seed = seed

    @property
    def rounds_per_epoch(self) -> int:
        """As many as it takes to see every prompt once, or fewer where that is asked for."""
        whole = -(-len(self.prompts) // self.config.prompts_per_rollout)
        return min(self.config.rollouts_per_epoch or whole, whole)

    @abstractmethod
    def _roll(self, cond: Conditioning, text: Tensor, noise: KeyedNoise) -> Iterator[Segment]:
        """Sample the prompts of cond once."""

    def collect(self, epoch: int, *, skip: int = 0) -> Iterator[Round[Pairs]]:
        """The pairs of each batch of prompts; to be trained on before the next is asked for.

        Of several processes each samples its share of the batch; all get all pairs.
        """
        generator = Generator().manual_seed(epoch_seed(self.seed, epoch))
        order = torch.randperm(len(self.prompts), generator=generator).tolist()
        size, timesteps = self.config.prompts_per_rollout, self.policy.timesteps
        for number in range(skip, self.rounds_per_epoch):
            chosen = order[number * size : (number + 1) * size]
            mine = chosen[distributed.share(len(chosen))]
            here = mine or chosen[:1]  # one without a prompt samples another's, and what it found is dropped
            batch = [self.prompts[i] for i in here]
            noise = KeyedNoise(self.seed, epoch, here, timesteps.device)
            cond, text = self.policy.encode(batch), self.scorer.encode(batch)
            with self.policy.merged():
                segments = list(self._roll(cond, text, noise))
            yield to_round([gathered(segment, drop=not mine) for segment in segments], timesteps.tolist())

    def loss(self, pairs: Pairs) -> Loss:
        """DPO's loss of single steps, the ratios clamped (SPO's paper, eq. 9; published code for the clamp)."""
        return step_loss(self.policy, pairs, beta=self.config.beta, clip_range=self.config.clip_range)


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
