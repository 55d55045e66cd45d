"""Methods that sample the policy: batches of prompts, examples from rollouts, and the loss of pairs of single steps.

One epoch samples each training prompt once, in batches of prompts. The policy is trained on the examples of a batch
before the next batch is sampled.
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
from spo.core.rollout import Segment, rollout
from spo.core.selection import pairs_of, select_pairs
from spo.core.threshold import rising_threshold, step_std
from spo.core.types import Denoiser, Loss, Pairs, Scorer, Transition
from spo.methods.method import Examples, Inputs, Round, Tally
from spo.runtime import distributed

S = TypeVar("S", bound=SampledConfig)
P = TypeVar("P", bound=PairConfig)
E = TypeVar("E", bound=Examples)


class SampledMethod(ABC, Generic[S, E]):
    """Trains on what a rollout of the policy gives, scored by the preference model.

    prompts: the training prompts; the index of a prompt is its id, which keys its noise.
    """

    def __init__(self, config: S, policy: Denoiser, scorer: Scorer, prompts: Sequence[str], *, seed: int = 0):
        self.config = config
        self.policy = policy
        self.scorer = scorer
        self.prompts = list(prompts)
        self.seed = seed

    @classmethod
    def build(cls, config: S, inputs: Inputs, *, seed: int) -> Self:
        return cls(config, inputs.policy, inputs.load_scorer(config.scoring), inputs.prompts, seed=seed)

    @abstractmethod
    def rollout_settings(self) -> dict[str, Any]:
        """The settings of `core.rollout.rollout`: candidates, first_step, branch_steps, continue_from."""

    @abstractmethod
    def round_of(self, segments: Iterator[Segment], *, drop: bool) -> Round[E]:
        """The examples of all processes from the segments of this one's prompts, which count for nothing if `drop`."""

    @abstractmethod
    def loss(self, examples: E) -> Loss:
        """The mean loss of the examples."""

    @property
    def rounds_per_epoch(self) -> int:
        """The batches that cover all prompts, or fewer if `rollouts_per_epoch` says so."""
        whole = -(-len(self.prompts) // self.config.prompts_per_rollout)
        return min(self.config.rollouts_per_epoch or whole, whole)

    def collect(self, epoch: int, *, skip: int = 0) -> Iterator[Round[E]]:
        """The examples of each batch of prompts; train on them before asking for the next.

        Each process samples its share of the batch, and all get all examples.
        """
        config, policy = self.config, self.policy
        generator = Generator().manual_seed(epoch_seed(self.seed, epoch))
        order = torch.randperm(len(self.prompts), generator=generator).tolist()
        size, device = config.prompts_per_rollout, policy.timesteps.device
        for number in range(skip, self.rounds_per_epoch):
            batch = order[number * size : (number + 1) * size]
            shard = batch[distributed.share(len(batch))]
            ids = shard or batch[:1]  # a process without a prompt samples another's and drops the result
            prompts = [self.prompts[i] for i in ids]
            noise = KeyedNoise(self.seed, epoch, ids, device)
            cond, text = policy.encode(prompts), self.scorer.encode(prompts)
            with policy.merged():
                segments = rollout(policy, self.scorer, cond, text, noise=noise, **self.rollout_settings())
                collected = self.round_of(segments, drop=not shard)
            yield collected


class PairMethod(SampledMethod[P, Pairs], Generic[P]):
    """Trains on the best and the worst path of each segment of a rollout."""

    def round_of(self, segments: Iterator[Segment], *, drop: bool) -> Round[Pairs]:
        at_random = self.config.pairs_at_random
        kept = [keep_pairs(each, threshold=self.threshold(each.times[0]), at_random=at_random) for each in segments]
        return _to_round([_gathered(each, drop=drop) for each in kept])

    def threshold(self, t: float) -> float:
        """The threshold of a segment whose first step starts at time t."""
        threshold = self.config.threshold
        return self._rising[t] if isinstance(threshold, RisingThreshold) else threshold

    @cached_property
    def _rising(self) -> dict[float, float]:
        """The rising threshold by the times of the policy's grid."""
        times, sampler = self.policy.timesteps, cast(Any, self.policy).sampler
        std = step_std(sampler.schedule, times, eta=sampler.eta)[: self.policy.num_trainable]
        rising = cast(RisingThreshold, self.config.threshold)
        return dict(zip(times.tolist(), rising_threshold(std, low=rising.low, high=rising.high).tolist(), strict=False))

    def loss(self, examples: Pairs) -> Loss:
        """DPO's loss on the ratios of single steps, clamped as in the published code (SPO's paper, eq. 9).

        The reference is the policy with its adapter off. Metrics are those of dpo_loss and `clipped`, the share of
        ratios at the clamp, which have no gradient.
        """
        log_p = step_log_prob(self.policy, examples)
        with torch.no_grad(), self.policy.reference():
            log_p_ref = step_log_prob(self.policy, examples)
        ratio = log_ratio(log_p, log_p_ref, clip_range=self.config.clip_range)
        loss = dpo_loss(ratio, beta=self.config.beta)
        clipped = (ratio != log_p - log_p_ref).float().mean()
        return Loss(loss.value, {**loss.metrics, "clipped": clipped.detach()}, loss.log_ratio)


@dataclass(frozen=True)
class KeptPairs:
    """The kept pairs of one segment, and its measurements."""

    pairs: tuple[Pairs, ...]  # num_kept pairs for each step; in the first step win and lose share x_t
    times: tuple[float, ...]  # of those steps
    num_branched: int  # b, the prompts
    num_kept: int
    score: float  # mean over (k, b)
    margin: float  # mean over b, kept or not


def keep_pairs(segment: Segment, *, threshold: float, at_random: bool = False) -> KeptPairs:
    """Best and worst path of each prompt whose margin is above the threshold.

    at_random pairs the first two candidates instead (the paper's ablation); they are independent draws like any two.
    """
    scores = segment.scores
    selection = select_pairs(scores[:2] if at_random else scores, threshold=threshold)
    num_kept, score, margin = torch.stack([selection.keep.sum(), scores.mean(), selection.margin.mean()]).tolist()
    pairs = pairs_of(segment.latents, segment.times, segment.cond, selection)
    return KeptPairs(pairs, segment.times[:-1], len(segment.cond), int(num_kept), score, margin)


def _gathered(kept: KeptPairs, *, drop: bool) -> KeptPairs:
    """The pairs of all processes in the order of the prompts; this process's own are left out if `drop`."""
    if distributed.count() == 1:
        return kept
    branched, num_kept = (0, 0) if drop else (kept.num_branched, kept.num_kept)
    means = {"score": kept.score * branched, "margin": kept.margin * branched}
    sums = distributed.add_up({"branched": branched, "kept": num_kept, **means})
    return KeptPairs(
        pairs=tuple((pairs[:0] if drop else pairs).map(distributed.gather) for pairs in kept.pairs),
        times=kept.times,
        num_branched=int(sums["branched"]),
        num_kept=int(sums["kept"]),
        score=sums["score"] / sums["branched"],
        margin=sums["margin"] / sums["branched"],
    )


def _to_round(segments: Sequence[KeptPairs]) -> Round[Pairs]:
    """The kept pairs of one batch of prompts; the tally of a segment counts for each of its steps."""
    kept = [pairs for segment in segments for pairs in segment.pairs if len(pairs)]
    measured = {
        "kept": sum(segment.num_kept for segment in segments) / sum(segment.num_branched for segment in segments),
        "margin": sum(segment.margin for segment in segments) / len(segments),
        "score": sum(segment.score for segment in segments) / len(segments),
    }
    tallies = [Tally(t, each.num_branched, each.num_kept, each.margin) for each in segments for t in each.times]
    return Round(Pairs.cat(kept) if kept else None, tallies, measured)


def step_log_prob(policy: Denoiser, pairs: Pairs) -> Tensor:
    """log p(x_prev | x_t) of win and lose (n, 2), means over (c, h, w); one forward for both where they share x_t."""
    if pairs.x_t.shape[1] == 1:
        return log_prob(_transition(policy, pairs.x_t[:, 0], pairs), pairs.x_prev)
    apart = (pairs.x_t[:, 0] != pairs.x_t[:, 1]).flatten(1).any(dim=1)  # (n,): not in a segment's first step
    once = torch.stack([torch.ones_like(apart), apart], dim=1).flatten()  # (2 n,): the rows of x_t that are predicted
    pair = torch.arange(len(pairs), device=apart.device).repeat_interleave(2)[once]
    transition = _transition(policy, pairs.x_t.flatten(0, 1)[once], pairs[pair])
    row = once.cumsum(dim=0) - 1  # (2 n,): where the prediction for each win and lose is
    return log_prob(transition.map(lambda tensor: tensor[row]), pairs.x_prev)


def _transition(policy: Denoiser, x_t: Tensor, rows: Pairs) -> Transition:
    """p(x_prev | x_t) of x_t (m, c, h, w) at the times and under the conditioning of m rows."""
    return policy.transition(policy.predict(x_t, rows.t, rows.cond), x_t, rows.t, rows.t_prev)
