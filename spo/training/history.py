"""The cost of a training run, and its tables."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from spo.methods.method import Tally
from spo.runtime.files import write_csv


@dataclass
class Cost:
    """What a training has used so far."""

    rounds: int = 0  # of collecting and training
    updates: int = 0
    num_examples: int = 0
    unet_forwards: int = 0  # samples; both halves of the guidance count, a latent preference model counts as half
    vae_decodes: int = 0  # images
    seconds: float = 0.0
    skipped: int = 0  # updates with a loss or gradient that was not finite


@dataclass
class TimestepSums:
    """Sums over the pairs of one timestep."""

    branched: int = 0
    kept: int = 0
    margin: float = 0.0  # over the branched pairs
    trained: int = 0
    log_ratio_win: float = 0.0  # over the trained pairs
    log_ratio_lose: float = 0.0


@dataclass
class History:
    """A row for each update and for each look of the watch, and sums over the pairs of each timestep."""

    updates: list[dict[str, float]] = field(default_factory=list)
    looks: list[dict[str, float]] = field(default_factory=list)
    timesteps: dict[float, TimestepSums] = field(default_factory=dict)

    def count(self, grid: Sequence[float], tallies: Sequence[Tally]) -> None:
        """Add the tallies; a t between two timesteps of the sampler's `grid` counts for the lower one."""
        for tally in tallies:
            sums = self._at(grid, tally.t)
            sums.branched += tally.num_branched
            sums.kept += tally.num_kept
            sums.margin += tally.margin * tally.num_branched

    def count_ratios(self, grid: Sequence[float], t: Sequence[float], log_ratio: Sequence[Sequence[float]]) -> None:
        """Add the log-ratios (win, lose) of the pairs that were trained on, at timesteps t."""
        for timestep, (win, lose) in zip(t, log_ratio, strict=True):
            sums = self._at(grid, timestep)
            sums.trained += 1
            sums.log_ratio_win += win
            sums.log_ratio_lose += lose

    def _at(self, grid: Sequence[float], t: float) -> TimestepSums:
        ascending = sorted(grid)
        return self.timesteps.setdefault(ascending[max(0, bisect_right(ascending, t) - 1)], TimestepSums())

    def to_json(self) -> dict[str, Any]:
        """A copy for `from_json`."""
        sums = [[t, asdict(of_t)] for t, of_t in self.timesteps.items()]
        return {"updates": list(self.updates), "looks": list(self.looks), "timesteps": sums}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(values["updates"], values["looks"], {t: TimestepSums(**of_t) for t, of_t in values["timesteps"]})

    def write(self, folder: Path) -> None:
        """Write history.csv, watch.csv and timesteps.csv; a mean over nothing is nan."""
        write_csv(folder / "history.csv", self.updates)
        write_csv(folder / "watch.csv", self.looks)
        rows = [
            {
                "timestep": t,
                "branched": sums.branched,
                "kept": sums.kept,
                "margin": _mean(sums.margin, sums.branched),
                "log_ratio_win": _mean(sums.log_ratio_win, sums.trained),
                "log_ratio_lose": _mean(sums.log_ratio_lose, sums.trained),
            }
            for t, sums in sorted(self.timesteps.items(), reverse=True)
        ]
        write_csv(folder / "timesteps.csv", rows)


def _mean(total: float, count: int) -> float:
    return total / count if count else float("nan")
