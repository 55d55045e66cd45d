"""D3PO: pairs of whole trajectories, scored once at their ends (arXiv 2311.13231).

Two trajectories of a prompt part at the first step, from one initial noise; the better end makes every step of its
trajectory a win. That is SPO's rollout with two candidates and a single segment, which is as long as the sampler.
"""

from collections.abc import Iterator
from typing import Any

from spo.config import D3poConfig
from spo.core.noise import KeyedNoise
from spo.core.rollout import Segment, rollout
from spo.core.types import Conditioning
from spo.methods.sampled import PairMethod


class D3po(PairMethod[D3poConfig]):
    """D3PO: two trajectories, scored at their ends. The published one asks people, here a preference model decides."""

    def _roll(self, cond: Conditioning, text: Any, noise: KeyedNoise) -> Iterator[Segment]:
        return rollout(
            self.policy,
            self.scorer,
            cond,
            text,
            candidates=2,
            first_step=0,
            branch_steps=len(self.policy.timesteps),
            noise=noise,
        )


METHOD = D3po
