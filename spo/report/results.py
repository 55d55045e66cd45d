"""What the evaluation found: its tables, looked up by sampler, column and metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spo.errors import DataError

BASE, CONTRAST = "base", "contrast"
Row = dict[str, Any]
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The rows of `evaluate`'s means.csv and comparisons.csv; every method is compared with the base."""

    means: Sequence[Row]
    comparisons: Sequence[Row]
    methods: tuple[str, ...]
    etas: tuple[float, ...]  # the first one decides
    num_prompts: int
    num_seeds: int = 1  # of training
    primary: str = "aesthetic"  # the score that is to rise
    guarded: tuple[str, ...] = ("alignment",)  # scores that must not be lost by it
    contrast_factor: float | None = None
    _means: dict[tuple[float, str, str], Row] = field(init=False, repr=False)
    _gains: dict[tuple[float, str, str, str], Row] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        means = {(row["eta"], row["column"], row["metric"]): row for row in self.means}
        gains = {(row["eta"], row["column"], row["against"], row["metric"]): row for row in self.comparisons}
        object.__setattr__(self, "_means", means)
        object.__setattr__(self, "_gains", gains)
        measured = dict.fromkeys(row["metric"] for row in self.means)
        if absent := [metric for metric in self.main if metric not in measured]:
            raise DataError(
                f"evaluate has not measured {', '.join(absent)}, only {', '.join(measured) or 'nothing'}; "
                "name measured scores in evaluate.primary and evaluate.guarded"
            )
        for eta in self.etas:
            for column in (BASE, *self.methods):
                known = all((eta, column, metric) in means for metric in self.main)
                compared = column == BASE or all((eta, column, BASE, metric) in gains for metric in self.main)
                if not known or not compared:
                    raise DataError(
                        f"the tables of evaluate have no {column} at eta {eta:g}; run `python -m spo evaluate` again"
                    )

    @property
    def main(self) -> tuple[str, ...]:
        """The scores of the verdict."""
        return (self.primary, *self.guarded)

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that images were scored by."""
        return tuple(dict.fromkeys(row["metric"] for row in self.means))

    @property
    def columns(self) -> tuple[str, ...]:
        """The base, the methods, others' LoRAs, and the control at the end."""
        found = dict.fromkeys(row["column"] for row in self.means)
        others = [column for column in found if column not in (BASE, CONTRAST, *self.methods)]
        return (BASE, *self.methods, *others, *([CONTRAST] if CONTRAST in found else []))

    @property
    def duels(self) -> list[tuple[str, str]]:
        """The pairs that were compared with each other, neither of them the base or the control."""
        pairs = dict.fromkeys((row["column"], row["against"]) for row in self.comparisons)
        return [pair for pair in pairs if not {BASE, CONTRAST} & set(pair)]

    def slot(self, column: str) -> int:
        """Which colour, dash and marker a column has in every chart."""
        return self.columns.index(column) - 1 if column in self.columns[1:] else 0

    def score(self, eta: float, column: str, metric: str) -> Figures | None:
        """mean, low, high; None where that was not measured."""
        return self._means.get((eta, column, metric))

    def gain(self, eta: float, column: str, metric: str, against: str = BASE) -> Figures | None:
        """difference, low, high, win_rate, ...; None where that was not compared."""
        return self._gains.get((eta, column, against, metric))

    def decided(self, column: str, metric: str, against: str = BASE) -> Figures:
        """The comparison under the deciding sampler."""
        return self._gains[self.etas[0], column, against, metric]


def direction(gain: Figures) -> int:
    """1 or -1 where the whole interval lies above or below zero, else 0."""
    return (gain["low"] > 0) - (gain["high"] < 0)


def level(gain: Figures) -> int:
    """1 or -1 where the whole interval of the win rate lies above or below one half, else 0."""
    return (gain["win_rate_low"] > 0.5) - (gain["win_rate_high"] < 0.5)
