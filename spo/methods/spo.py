"""SPO: pairs from the policy's own denoising steps, scored step by step (arXiv 2406.04314)."""

from collections.abc import Iterator
from typing import Any

from spo.config import SpoConfig
from spo.core.noise import KeyedNoise
from spo.core.rollout import Segment, rollout
from spo.core.types import Conditioning
from spo.methods.sampled import PairMethod


class Spo(PairMethod[SpoConfig]):
    """SPO: candidates of one step, scored at each step."""

    def _roll(self, cond: Conditioning, text: Any, noise: KeyedNoise) -> Iterator[Segment]:
        return rollout(
            self.policy,
            self.scorer,
            cond,
            text,
            candidates=self.config.candidates,
            first_step=self.config.first_step,
            branch_steps=self.config.branch_steps,
            noise=noise,
            continue_from=self.config.continue_from,
        )


METHOD = Spo
