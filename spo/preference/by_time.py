"""Two preference models that share the timesteps: one for noisy candidates, another for the last steps."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spo.core.types import Candidates, Scorer


class ByTime:
    """A core.types.Scorer: `late` scores candidates at times up to `at_most`, `early` all others.

    A latent model judges noisy candidates better, a pixel model nearly clean ones. Scores of one x_t are compared with
    each other only, so the two need no common scale.
    """

    def __init__(self, early: Scorer, late: Scorer, *, at_most: float):
        self.early = early
        self.late = late
        self.at_most = at_most

    def encode(self, prompts: Sequence[str]) -> tuple[Any, Any]:
        return self.early.encode(prompts), self.late.encode(prompts)

    def __call__(self, candidates: Candidates) -> Tensor:
        """Scores (k, b) of candidates whose `text` is what `encode` gave."""
        early, late = candidates.text
        if candidates.t <= self.at_most:
            return self.late(candidates.with_text(late))
        return self.early(candidates.with_text(early))
