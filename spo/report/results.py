"""The evaluation's tables, looked up by sampler, column and metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
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
    samplers: Mapping[str, str]  # name and description; the first one decides
    num_prompts: int
    num_seeds: int = 1  # of training
    primary: str = "aesthetic"  # the score that should rise
    guarded: tuple[str, ...] = ("alignment",)  # scores that must not fall
    contrast_factor: float | None = None

    def __post_init__(self) -> None:
        if absent := [metric for metric in self.main if metric not in self.metrics]:
            raise DataError(
                f"evaluate has not measured {', '.join(absent)}, only {', '.join(self.metrics) or 'nothing'}; "
                "name measured scores in evaluate.primary and evaluate.guarded"
            )
        for sampler, column, metric in product(self.samplers, (BASE, *self.methods), self.main):
            compared = column == BASE or self.gain(sampler, column, metric) is not None
            if self.score(sampler, column, metric) is None or not compared:
                raise DataError(
                    f"the tables of evaluate have no {column} with {sampler}; run `python -m spo evaluate` again"
                )

    @cached_property
    def _means(self) -> dict[tuple[str, str, str], Row]:
        return {(row["sampler"], row["column"], row["metric"]): row for row in self.means}

    @cached_property
    def _gains(self) -> dict[tuple[str, str, str, str], Row]:
        return {(row["sampler"], row["column"], row["against"], row["metric"]): row for row in self.comparisons}

    @property
    def deciding(self) -> str:
        return next(iter(self.samplers))

    @property
    def main(self) -> tuple[str, ...]:
        """The scores of the verdict."""
        return (self.primary, *self.guarded)

    @property
    def metrics(self) -> tuple[str, ...]:
        """All scores of the images."""
        return tuple(dict.fromkeys(row["metric"] for row in self.means))

    @property
    def columns(self) -> tuple[str, ...]:
        """The base, the methods, others' LoRAs, and the control at the end."""
        found = dict.fromkeys(row["column"] for row in self.means)
        others = [column for column in found if column not in (BASE, CONTRAST, *self.methods)]
        return (BASE, *self.methods, *others, *([CONTRAST] if CONTRAST in found else []))

    @property
    def duels(self) -> list[tuple[str, str]]:
        """The pairs that were compared, without base and control."""
        pairs = dict.fromkeys((row["column"], row["against"]) for row in self.comparisons)
        return [pair for pair in pairs if not {BASE, CONTRAST} & set(pair)]

    def slot(self, column: str) -> int:
        """The number of a column's colour, dash and marker in every chart."""
        return self.columns.index(column) - 1 if column in self.columns[1:] else 0

    def score(self, sampler: str, column: str, metric: str) -> Figures | None:
        """mean, low, high; None if it was not measured."""
        return self._means.get((sampler, column, metric))

    def gain(self, sampler: str, column: str, metric: str, against: str = BASE) -> Figures | None:
        """difference, low, high, win_rate, ...; None if it was not compared."""
        return self._gains.get((sampler, column, against, metric))

    def decided(self, column: str, metric: str, against: str = BASE) -> Figures:
        """The comparison with the deciding sampler."""
        return self._gains[self.deciding, column, against, metric]


def direction(gain: Figures) -> int:
    """1 or -1 if the whole interval lies above or below zero, else 0."""
    return (gain["low"] > 0) - (gain["high"] < 0)


def level(gain: Figures) -> int:
    """1 or -1 if the win rate's whole interval lies above or below one half, else 0."""
    return (gain["win_rate_low"] > 0.5) - (gain["win_rate_high"] < 0.5)
