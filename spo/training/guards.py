"""Guards of a training run: they stop bad updates and warn if nothing is being learned."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spo.errors import TrainingError

AT_THE_CLIP = 0.9  # share of ratios at the clamp above which an update teaches almost nothing
NO_MARGIN = 1e-6  # margin below which all scores count as equal


@dataclass
class FiniteGuard:
    """Allows updates with finite loss and gradient; ends the run after too many others in a row."""

    most_in_a_row: int
    remedy: str
    skipped: int = 0
    in_a_row: int = 0

    def allows(self, loss: float, grad_norm: float) -> bool:
        """Whether to make the update; counts it if not. TrainingError with the remedy after too many in a row."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.skipped == 1:
            warn(f"an update is skipped: its loss is {loss:.4g}, its gradient norm {grad_norm:.4g}")
        if self.in_a_row >= self.most_in_a_row:
            raise TrainingError(
                f"{self.in_a_row} updates in a row had a loss or gradient that is not finite (the last: {loss:.4g} and "
                f"{grad_norm:.4g}) and were skipped; {self.remedy}"
            )
        return False


class Streak:
    """Warns once each time a condition has held for `length` observations in a row."""

    def __init__(self, length: int, message: str):
        self._length = length
        self._message = message
        self._count = 0

    def see(self, condition: bool) -> None:
        self._count = self._count + 1 if condition else 0
        if self._count == self._length:
            warn(self._message.format(n=self._length))


class StallDetector:
    """Warns if the rounds of an alignment teach nothing."""

    def __init__(self, length: int):
        self._no_pairs = Streak(
            length,
            "for {n} rounds no pair was kept: the method's threshold is above the margins, or the preference model "
            "cannot tell the candidates apart; lower the threshold, or train the preference model for longer",
        )
        self._alike = Streak(
            length,
            "for {n} rounds the preference model has scored all candidates alike: with sampling.eta=0 they are the "
            "same image, and a broken preference model scores all images alike; look at train_preference's accuracy",
        )
        self._clipped = Streak(
            length,
            "for {n} updates nine of ten ratios were at the clip, which gives no gradient: the policy is as far from "
            "the reference as clip_range allows; lower optimizer.learning_rate, or raise clip_range",
        )

    def see(self, *, kept: bool, margin: float, rows: Sequence[Mapping[str, float]]) -> None:
        """One round: whether it kept a pair, its largest margin, and the measurements of its updates."""
        self._no_pairs.see(not kept)
        self._alike.see(margin < NO_MARGIN)
        for row in rows:
            self._clipped.see(row.get("clipped", 0.0) >= AT_THE_CLIP)


def warn(message: str) -> None:
    """Write one line to stderr, below a progress bar."""
    print(f"\nwarning: {message}" if sys.stderr.isatty() else f"warning: {message}", file=sys.stderr, flush=True)
