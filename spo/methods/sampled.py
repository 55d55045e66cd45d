"""What the methods share that sample the policy: batches of prompts, pairs out of rollouts, the loss of single steps.

One epoch samples each training prompt once, a batch of prompts at a time; the examples of a batch are trained on at
once, so that the next batch is sampled by the policy as it has become.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Generator, Tensor

from spo.config import PairConfig, RisingThreshold, SampledConfig
from spo.core.gaussian import log_prob
from spo.core.losses import dpo_loss, log_ratio
from spo.core.noise import KeyedNoise, epoch_seed
from spo.core.rollout import Segment
from spo.core.selection import pairs_of, select_pairs
from spo.core.threshold import rising_threshold, step_std
from spo.core.types import Conditioning, Denoiser, Loss, Pairs, Scorer
from spo.methods.method import E, Inputs, Round, Tally
from spo.runtime import distributed

C = TypeVar("C", bound=SampledConfig)
P = TypeVar("P", bound=PairConfig)


class SampledMethod(ABC, Generic[C, E]):
    """Collects examples by sampling the policy and scoring the samples with the preference model.

    prompts: the training prompts; a prompt is known by its index in them, to which all its noise is keyed.
    """

    def __init__(self, config: C, policy: Denoiser, scorer: Scorer, prompts: Sequence[str], *, seed: int = 0):
        self.config = config
        self.policy = policy
        self.scorer = scorer
        self.prompts = list(prompts)
        self.seed = seed

    @classmethod
    def build(cls, config: C, inputs: Inputs, *, seed: int) -> Self:
        return cls(config, inputs.policy, inputs.load_scorer(config.scoring), inputs.prompts, seed=seed)

    @property
    def rounds_per_epoch(self) -> int:
        """As many as it takes to see every prompt once, or fewer where that is asked for."""
        whole = -(-len(self.prompts) // self.config.prompts_per_rollout)
        return min(self.config.rollouts_per_epoch or whole, whole)

    def collect(self, epoch: int, *, skip: int = 0) -> Iterator[Round[E]]:
        """The examples of each batch of prompts; to be trained on before the next is asked for.

        Of several processes each samples its share of the batch; all get all examples.
        """
        generator = Generator().manual_seed(epoch_seed(self.seed, epoch))
        order = torch.randperm(len(self.prompts), generator=generator).tolist()
        size, device = self.config.prompts_per_rollout, self.policy.timesteps.device
        for number in range(skip, self.rounds_per_epoch):
            chosen = order[number * size : (number + 1) * size]
            shard = chosen[distributed.share(len(chosen))]
            ids = shard or chosen[:1]  # a process without a prompt samples another's, and what it finds is dropped
            batch = [self.prompts[i] for i in ids]
            noise = KeyedNoise(self.seed, epoch, ids, device)
            cond, text = self.policy.encode(batch), self.scorer.encode(batch)
            with self.policy.merged():
                collected = self._collect_batch(cond, text, noise, drop=not shard)
            yield collected

    @abstractmethod
    def _collect_batch(self, cond: Conditioning, text: Any, noise: KeyedNoise, *, drop: bool) -> Round[E]:
        """Sample the prompts of cond once: the examples of all processes, without this one's own if `drop`."""

    @abstractmethod
    def loss(self, examples: E) -> Loss: ...


class PairMethod(SampledMethod[P, Pairs]):
    """Trains on the best and the worst path of each segment of a rollout."""

    @abstractmethod
    def _roll(self, cond: Conditioning, text: Any, noise: KeyedNoise) -> Iterator[Segment]:
        """Sample the prompts of cond once."""

    def _collect_batch(self, cond: Conditioning, text: Any, noise: KeyedNoise, *, drop: bool) -> Round[Pairs]:
        kept = [
            keep_pairs(segment, threshold=self._threshold(segment.times[0]), at_random=self.config.pairs_at_random)
            for segment in self._roll(cond, text, noise)
        ]
        return to_round([gathered(each, drop=drop) for each in kept])

    def _threshold(self, t: float) -> float:
        """That of a segment whose first step is from time t."""
        threshold = self.config.threshold
        return self._rising[t] if isinstance(threshold, RisingThreshold) else threshold

    @cached_property
    def _rising(self) -> dict[float, float]:
        """By the times of the policy's grid."""
        times, sampler = self.policy.timesteps, cast(Any, self.policy).sampler
        std = step_std(sampler.schedule, times, eta=sampler.eta)
        rising = cast(RisingThreshold, self.config.threshold)
        return dict(zip(times.tolist(), rising_threshold(std, low=rising.low, high=rising.high).tolist(), strict=True))

    def loss(self, examples: Pairs) -> Loss:
        """DPO's loss of single steps, the ratios clamped (SPO's paper, eq. 9; published code for the clamp)."""
        return step_loss(self.policy, examples, beta=self.config.beta, clip_range=self.config.clip_range)


@dataclass(frozen=True)
class KeptPairs:
    """The kept pairs of one segment, and what happened in it."""

    pairs: tuple[Pairs, ...]  # one a step, each of num_kept pairs; in the first, win and lose share x_t
    times: tuple[float, ...]  # of those steps
    num_branched: int  # b, the prompts
    num_kept: int
    score: float  # mean over (k, b)
    margin: float  # mean over b, kept or not


def keep_pairs(segment: Segment, *, threshold: float, at_random: bool = False) -> KeptPairs:
    """Best and worst path of each prompt whose margin is above the threshold.

    at_random pairs the first two candidates instead, which are as good as any two, being independent draws from one
    Gaussian: the paper's ablation.
    """
    scores = segment.scores
    selection = select_pairs(scores[:2] if at_random else scores, threshold=threshold)
    num_kept, score, margin = torch.stack([selection.keep.sum(), scores.mean(), selection.margin.mean()]).tolist()
    pairs = pairs_of(segment.latents, segment.times, segment.cond, selection)
    return KeptPairs(pairs, segment.times[:-1], len(segment.cond), int(num_kept), score, margin)


def gathered(kept: KeptPairs, *, drop: bool) -> KeptPairs:
    """The pairs of all processes' prompts, in the prompts' order; this one's own are left out if `drop`."""
    if distributed.count() == 1:
        return kept
    weight = 0 if drop else kept.num_branched
    sums = distributed.add_up(
        {
            "branched": weight,
            "kept": 0 if drop else kept.num_kept,
            "score": kept.score * weight,
            "margin": kept.margin * weight,
        }
    )
    return KeptPairs(
        pairs=tuple((pairs[:0] if drop else pairs).map(distributed.gather) for pairs in kept.pairs),
        times=kept.times,
        num_branched=int(sums["branched"]),
        num_kept=int(sums["kept"]),
        score=sums["score"] / sums["branched"],
        margin=sums["margin"] / sums["branched"],
    )


def to_round(segments: Sequence[KeptPairs]) -> Round[Pairs]:
    """The kept pairs of one batch of prompts; a segment's tally counts for each of its steps."""
    kept = [pairs for segment in segments for pairs in segment.pairs if len(pairs)]
    branched = sum(segment.num_branched for segment in segments)
    measured = {
        "kept": sum(segment.num_kept for segment in segments) / branched,
        "margin": sum(segment.margin for segment in segments) / len(segments),
        "score": sum(segment.score for segment in segments) / len(segments),
    }
    tallies = [
        Tally(t, segment.num_branched, segment.num_kept, segment.margin) for segment in segments for t in segment.times
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
