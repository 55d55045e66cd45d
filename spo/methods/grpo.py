"""GRPO: every step of whole trajectories, weighted by the trajectory's advantage over its group.

A group is the `candidates` trajectories of a prompt. They start from one initial noise (as in DanceGRPO, arXiv
2505.07818) and separate at the first step; the preference model scores their ends. Flow-GRPO (arXiv 2505.05470) starts
each from its own noise.
"""

from abc import abstractmethod
from collections.abc import Iterator
from statistics import fmean
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from spo.config import GroupConfig, GrpoConfig
from spo.core.gaussian import log_prob
from spo.core.losses import clipped_advantage_loss, gaussian_divergence
from spo.core.rollout import Segment
from spo.core.selection import group_advantage, select_pairs
from spo.core.types import Loss, Steps, Transition
from spo.methods.method import Round, Tally
from spo.methods.sampled import SampledMethod
from spo.runtime import distributed

G = TypeVar("G", bound=GroupConfig)


class GroupMethod(SampledMethod[G, Steps], Generic[G]):
    """Examples with advantages over their group; the ratio is to the policy that sampled them."""

    def round_of(self, segments: Iterator[Segment], *, drop: bool) -> Round[Steps]:
        parts: list[Steps] = []
        tallies: list[Tally] = []
        measured: list[dict[str, float]] = []
        for segment in segments:
            scores, b = segment.scores, 0 if drop else len(segment.cond)
            made = self.steps_of(segment, group_advantage(scores, limit=self.config.max_advantage))
            if distributed.count() > 1:
                made = [(part[:0] if drop else part).map(distributed.gather) for part in made]
            sums = distributed.add_up(
                {
                    "prompts": b,
                    "score": scores.mean().item() * b,
                    "margin": select_pairs(scores, threshold=0.0).margin.mean().item() * b,
                    "spread": scores.std(dim=0).mean().item() * b,
                }
            )
            means = {name: sums[name] / sums["prompts"] for name in ("score", "margin", "spread")}
            steps = zip(segment.times, made, strict=False)
            tallies += [Tally(t, len(part), len(part), means["margin"]) for t, part in steps]
            parts += made
            measured.append(means)
        names = measured[0]
        return Round(Steps.cat(parts), tallies, {name: fmean(each[name] for each in measured) for name in names})

    @abstractmethod
    def steps_of(self, segment: Segment, advantage: Tensor) -> list[Steps]:
        """The examples of each step of a segment; advantage: (k, b)."""

    def loss(self, examples: Steps) -> Loss:
        """PPO's clipped loss of the advantages, and `kl_weight` times the divergence from the reference.

        Metrics: `ratio`, its mean; `clipped`, the share of examples outside the clip range; `divergence`.
        """
        transition = self._transition(examples)
        ratio = (log_prob(transition, examples.x_prev) - examples.log_p).exp()
        loss = clipped_advantage_loss(ratio, examples.advantage, clip_range=self.config.clip_range)
        if self.config.kl_weight == 0:
            return loss
        with torch.no_grad(), self.policy.reference():
            reference = self._transition(examples)
        divergence = gaussian_divergence(transition, reference).mean()
        metrics = {**loss.metrics, "divergence": divergence.detach()}
        return Loss(loss.value + self.config.kl_weight * divergence, metrics)

    def _transition(self, examples: Steps) -> Transition:
        output = self.policy.predict(examples.x_t, examples.t, examples.cond)
        return self.policy.transition(output, examples.x_t, examples.t, examples.t_prev)


class Grpo(GroupMethod[GrpoConfig]):
    """Each step of each trajectory is an example."""

    def rollout_settings(self) -> dict[str, Any]:
        return {
            "candidates": self.config.candidates,
            "first_step": 0,
            "branch_steps": len(self.policy.timesteps),
        }

    def steps_of(self, segment: Segment, advantage: Tensor) -> list[Steps]:
        return steps_of(segment, advantage)


def steps_of(segment: Segment, advantage: Tensor) -> list[Steps]:
    """For each step of a segment its k b examples, prompt by prompt; advantage: (k, b)."""
    k, b = advantage.shape

    def flat(tensor: Tensor) -> Tensor:  # (1 or k, b, ...) -> (b * k, ...)
        return tensor.expand(k, *tensor.shape[1:]).transpose(0, 1).flatten(0, 1)

    cond = segment.cond.repeat_interleave(k)
    found = []
    for i, transition in enumerate(segment.transitions):
        x_prev, flat_transition = flat(segment.latents[i + 1]), transition.map(flat)
        t, t_prev = (torch.full((b * k,), time, device=x_prev.device) for time in segment.times[i : i + 2])
        log_p = log_prob(flat_transition, x_prev)
        found.append(
            Steps(
                x_t=flat(segment.latents[i]),
                x_prev=x_prev,
                t=t,
                t_prev=t_prev,
                cond=cond,
                log_p=log_p,
                advantage=flat(advantage),
            )
        )
    return found


METHOD = Grpo
