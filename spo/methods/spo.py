"""SPO: pairs from the policy's own denoising steps, judged step by step (arXiv 2406.04314).

One epoch samples each training prompt once, a batch of prompts at a time; the pairs of a batch are trained on at
once, so that the next batch is sampled by the policy as it has become.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from spo.config import SpoConfig
from spo.core.gaussian import log_prob
from spo.core.losses import dpo_loss, log_ratio
from spo.core.noise import KeyedNoise
from spo.core.rollout import Segment, rollout
from spo.core.types import Denoiser, Loss, Pairs, Scorer


class Spo:
    """What SPO collects and what it minimises.

    prompts: the training prompts; a prompt is known by its index in them, to which all its noise is keyed.
    """

    def __init__(self, config: SpoConfig, policy: Denoiser, scorer: Scorer, prompts: Sequence[str]):
        self.config = config
        self.policy = policy
        self.scorer = scorer
        self.prompts = list(prompts)

    @property
    def rollouts_per_epoch(self) -> int:
        whole = -(-len(self.prompts) // self.config.prompts_per_rollout)
        return min(self.config.rollouts_per_epoch or whole, whole)

    def collect(self, epoch: int) -> Iterator[list[Segment]]:
        """The segments of each batch of prompts; to be trained on before the next is asked for."""
        order = torch.randperm(len(self.prompts), generator=_generator(self.config.seed, epoch)).tolist()
        size = self.config.prompts_per_rollout
        for start in range(0, self.rollouts_per_epoch * size, size):
            chosen = order[start : start + size]
            prompts = [self.prompts[i] for i in chosen]
            segments = rollout(
                self.policy,
                self.scorer,
                self.policy.encode(prompts),
                self.scorer.encode(prompts),
                candidates=self.config.candidates,
                first_step=self.config.first_step,
                branch_steps=self.config.branch_steps,
                threshold=self.config.threshold,
                noise=KeyedNoise(self.config.seed, epoch, chosen, self.policy.timesteps.device),
                continue_from=self.config.continue_from,
            )
            yield list(segments)

    def loss(self, pairs: Pairs) -> Loss:
        """DPO's loss on the clamped ratios of policy and reference (paper, eq. 9; published code for the clamp).

        The reference is the policy with its adapter off. Metrics are dpo_loss's and `clipped`, the share of ratios
        at the clamp, which have no gradient.
        """
        log_p = step_log_prob(self.policy, pairs)
        with torch.no_grad(), self.policy.reference():
            log_p_ref = step_log_prob(self.policy, pairs)
        ratio = log_ratio(log_p, log_p_ref, clip_range=self.config.clip_range)
        loss = dpo_loss(ratio, beta=self.config.beta)
        clipped = (ratio != log_p - log_p_ref).float().mean()
        return Loss(loss.value, {**loss.metrics, "clipped": clipped.detach()})


def step_log_prob(policy: Denoiser, pairs: Pairs) -> Tensor:
    """log p(x_prev | x_t) of win and lose (n, 2), means over (c, h, w); where they share x_t, of one forward."""
    width = pairs.x_t.shape[1]
    x_t = pairs.x_t.flatten(0, 1)  # (n * width, c, h, w)
    t, t_prev = pairs.t.repeat_interleave(width), pairs.t_prev.repeat_interleave(width)
    cond = pairs.cond if width == 1 else pairs.cond.repeat_interleave(width)
    return log_prob(policy.transition(policy.predict(x_t, t, cond), x_t, t, t_prev), pairs.x_prev)


def _generator(seed: int, epoch: int) -> Generator:
    return Generator().manual_seed(seed * 1_000_003 + epoch)
