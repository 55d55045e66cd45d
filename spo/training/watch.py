"""The watch of a training, which shows reward hacking while it happens.

At intervals the policy generates the same few validation images from the same noise. The preference model, which the
training optimises, and an independent metric, which the training never sees, score them. Each gain is the change since
the start, in standard deviations of the start's scores over the prompts, so the two can be compared: a gap opens if
the first gain rises and the second does not.

The watch changes no weight and no pair; it can only end the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from spo.config import WatchConfig
from spo.training.history import Cost

Row = dict[str, float]


@dataclass(frozen=True)
class Watch:
    """paint generates images (n, 3, H, W) in [0, 1]; preference and independent score them (n,), higher is better."""

    config: WatchConfig
    paint: Callable[[], Tensor]
    preference: Callable[[Tensor], Tensor]
    independent: Callable[[Tensor], Tensor]

    def is_due(self, cost: Cost, rows: Sequence[Row]) -> bool:
        """At the start and every `every` rounds, but never twice in one round."""
        return cost.rounds % self.config.every == 0 and not any(row["round"] == cost.rounds for row in rows)

    def look(self, cost: Cost, rows: Sequence[Row]) -> tuple[Row, Tensor]:
        """A row of measurements, and the images; `rows` are those of the earlier looks, the first one at the start."""
        images = self.paint()
        row: Row = {"round": cost.rounds, "update": cost.updates, "unet_forwards": cost.unet_forwards}
        for name, scorer in {"preference": self.preference, "independent": self.independent}.items():
            scores = scorer(images).float()
            row |= {name: scores.mean().item(), f"{name}_std": scores.std(correction=0).item()}
        start = rows[0] if rows else row
        for name in ("preference", "independent"):
            row[f"{name}_gain"] = (row[name] - start[name]) / max(start[f"{name}_std"], 1e-6)
        row["gap"] = row["preference_gain"] - row["independent_gain"]
        return row, images

    def ends(self, rows: Sequence[Row]) -> bool:
        """Whether the last `stop_after_worse` looks were all below the best one before them."""
        patience = self.config.stop_after_worse
        if patience is None or len(rows) <= patience:
            return False
        values = [row["independent"] for row in rows]
        return max(values[-patience:]) < max(values[:-patience])
