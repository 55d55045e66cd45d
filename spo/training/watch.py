"""Watching a training from outside, so that reward hacking is seen while it happens.

Now and then the policy paints the same few held-out prompts from the same noise. The preference model, which the
training pleases, and a metric that the training never sees both score the pictures. Each gain is counted from the
start, in standard deviations of the start's scores over the prompts, so that the two can be compared: where the first
rises and the second does not, the gap opens.

The watch is handed its functions; it changes no weight and no pair. All it can do is end the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from spo.config import WatchConfig
from spo.training.history import Cost

Row = dict[str, float]


@dataclass(frozen=True)
class Watch:
    """paint: makes the pictures (n, 3, H, W) in [0, 1]; preference, independent: score them (n,), higher is better."""

    config: WatchConfig
    paint: Callable[[], Tensor]
    preference: Callable[[Tensor], Tensor]
    independent: Callable[[Tensor], Tensor]

    def is_due(self, cost: Cost, rows: Sequence[Row]) -> bool:
        """At the start, and each `every` rounds; never twice at one round."""
        return cost.rounds % self.config.every == 0 and not any(row["round"] == cost.rounds for row in rows)

    def look(self, cost: Cost, rows: Sequence[Row]) -> tuple[Row, Tensor]:
        """What there is to record, and the pictures; `rows` are those of the looks before, the first at the start."""
        pictures = self.paint()
        row: Row = {"round": cost.rounds, "update": cost.updates, "unet_forwards": cost.unet_forwards}
        for name, scorer in {"preference": self.preference, "independent": self.independent}.items():
            scores = scorer(pictures).float()
            row |= {name: scores.mean().item(), f"{name}_std": scores.std(correction=0).item()}
        start = rows[0] if rows else row
        for name in ("preference", "independent"):
            row[f"{name}_gain"] = (row[name] - start[name]) / max(start[f"{name}_std"], 1e-6)
        row["gap"] = row["preference_gain"] - row["independent_gain"]
        return row, pictures

    def ends(self, rows: Sequence[Row]) -> bool:
        """Whether the last `stop_after_worse` looks were all below the best one before them."""
        patience = self.config.stop_after_worse
        if patience is None or len(rows) <= patience:
            return False
        values = [row["independent"] for row in rows]
        return max(values[-patience:]) < max(values[:-patience])
