"""GRPO of single steps: the group is the k candidates that one step draws from one x_t, as in SPO.

Sampling continues from a random candidate. SPO learns from the best and the worst of the candidates, which it compares
with the reference; this learns from all of them, and the ratio is to the policy that sampled them. They share x_t, so
one forward of the policy serves all k.
"""

from typing import Any

import torch
from torch import Tensor

from spo.config import StepGrpoConfig
from spo.core.gaussian import log_prob
from spo.core.rollout import Segment
from spo.core.types import Steps
from spo.methods.grpo import GroupMethod


class StepGrpo(GroupMethod[StepGrpoConfig]):
    """Each x_t with its k candidates is an example."""

    def rollout_settings(self) -> dict[str, Any]:
        return self.config.model_dump(include={"candidates", "first_step", "look_ahead"}) | {"branch_steps": 1}

    def steps_of(self, segment: Segment, advantage: Tensor) -> list[Steps]:
        [transition], (x_t, x_prev) = segment.transitions, segment.latents
        own = transition.map(lambda tensor: tensor[0])
        x_prev = x_prev.transpose(0, 1)  # (b, k, c, h, w)
        t, t_prev = (torch.full((len(x_prev),), time, device=x_prev.device) for time in segment.times)
        log_p = log_prob(own, x_prev)
        return [
            Steps(
                x_t=x_t[0],
                x_prev=x_prev,
                t=t,
                t_prev=t_prev,
                cond=segment.cond,
                log_p=log_p,
                advantage=advantage.transpose(0, 1),
            )
        ]


METHOD = StepGrpo
