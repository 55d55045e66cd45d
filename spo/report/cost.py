"""Score against compute: what each method's checkpoints cost, and how much less one needs than another."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from spo.report.compute_saving import Saving, Scores, Spread, points, saving, spread
from spo.report.results import BASE, Results

Row = dict[str, Any]
CURRENCIES = {"unet_forwards": "UNet forwards", "seconds": "seconds of alignment"}  # as in a checkpoint's cost
WITH_PREFERENCE = "_with_preference_model"


@dataclass(frozen=True)
class Duel:
    """How much compute one method saves against another, in one unit, and the sentence about it."""

    method: str
    other: str
    currency: str
    saving: Saving | None
    spread: Spread | None
    sentence: str


def duels(
    results: Results,
    validation: Sequence[Row],
    scores: Sequence[Row],
    *,
    tolerance: float,
    preference_cost: Mapping[str, Mapping[str, float]],
) -> list[Duel]:
    """Each pair of methods in each unit of compute, from the means of their training seeds.

    validation: a row for each checkpoint, with its cost; scores: a row for each checkpoint and prompt.
    preference_cost: of training the preference model of each method that needs one, if known.
    """
    base = curve(scores, BASE, results.main)
    curves = {name: curve(scores, name, results.main) for name in results.methods}
    found = []
    for name, other in combinations(results.methods, 2):
        extra = {each: preference_cost.get(each, {}) for each in (name, other)}
        for currency, unit, with_preference in _currencies(extra.values()):
            both = [
                (_compute(validation, each, currency, more.get(currency, 0) if with_preference else 0), curves[each])
                for each, more in extra.items()
            ]
            if not base or not all(scores and compute[0] > 0 for compute, scores in both):
                continue
            label = f"{currency}{WITH_PREFERENCE}" if with_preference else currency
            found.append(_duel(results.primary, (name, other), (label, unit), both, base, tolerance))
            if found[-1].saving is None:  # there is nothing to reach, in any unit
                break
    return found


def _currencies(preference_costs: Iterable[Mapping[str, float]]) -> list[tuple[str, str, bool]]:
    """Name, unit, and whether the training of preference models counts: first with it, if one was trained."""
    costs = list(preference_costs)
    with_preference = [
        (name, f"{unit.removesuffix(' of alignment')}, the preference model's training included", True)
        for name, unit in CURRENCIES.items()
        if any(cost.get(name) for cost in costs)
    ]
    return [*with_preference, *((name, unit, False) for name, unit in CURRENCIES.items())]


def curve(rows: Sequence[Row], column: str, metrics: Sequence[str]) -> Scores:
    """For each metric (checkpoints, prompts): means over the training seeds; empty without rows."""
    seeds: dict[Any, dict[str, list[Row]]] = {}
    for row in rows:
        if row["column"] == column:
            seed = None if np.isnan(row["training_seed"]) else row["training_seed"]
            seeds.setdefault(seed, {}).setdefault(row["checkpoint"], []).append(row)
    together = list(zip(*(checkpoints.values() for checkpoints in seeds.values()), strict=False))
    if not together:
        return {}
    return {
        metric: np.array([np.mean([[row[metric] for row in own] for own in at], axis=0) for at in together])
        for metric in metrics
    }


def by_checkpoint(validation: Sequence[Row], method: str) -> list[list[Row]]:
    """The rows of a method's seeds, grouped by checkpoint; checkpoints that all seeds have."""
    seeds: dict[Any, list[Row]] = {}
    for row in validation:
        if row["column"] == method:
            seeds.setdefault(row["training_seed"], []).append(row)
    return [list(rows) for rows in zip(*seeds.values(), strict=False)]


def leading(found: Sequence[Duel]) -> list[Duel]:
    """The first of each pair of methods: UNet forwards, with the preference model's training if there was one."""
    pairs = dict.fromkeys((duel.method, duel.other) for duel in found)
    return [next(duel for duel in found if (duel.method, duel.other) == pair) for pair in pairs]


def numbers(found: Sequence[Duel]) -> dict[str, dict[str, float]]:
    """times_less_<unit> of each pair with its interval; nothing if the level was not reached."""
    table: dict[str, dict[str, float]] = {}
    for duel in found:
        if duel.saving is not None and duel.saving.times is not None:
            values = {"": duel.saving.times}
            if duel.spread is not None:
                values |= {"_low": duel.spread.low, "_high": duel.spread.high}
            pair = table.setdefault(f"{duel.method}_vs_{duel.other}", {})
            pair |= {f"times_less_{duel.currency}{end}": round(value, 3) for end, value in values.items()}
    return table


def _compute(validation: Sequence[Row], method: str, currency: str, more: float) -> list[float]:
    """The cost of each of a method's checkpoints, the mean of its training seeds, plus `more`."""
    return [fmean(row[currency] for row in rows) + more for rows in by_checkpoint(validation, method)] or [0.0]


def _duel(
    metric: str, names: tuple[str, str], currency: tuple[str, str], both: list[Any], base: Scores, tolerance: float
) -> Duel:
    primary = base[metric][0]
    ones = np.ones(len(primary))
    curves = [points(compute, scores, base, ones, tolerance=tolerance) for compute, scores in both]
    found = saving(*curves, base=float(primary.mean()))
    interval = None if found is None else spread(both[0], both[1], base, tolerance=tolerance)
    return Duel(*names, currency[0], found, interval, _sentence(metric, *names, currency[1], found, interval))


def _sentence(metric: str, name: str, other: str, unit: str, found: Saving | None, interval: Spread | None) -> str:
    if found is None:
        return f"{other} has no checkpoint that is better than the base on validation prompts: nothing to reach."
    goal = f"{other}'s best validation {metric} ({found.level:.3f}, at {found.compute:,.0f} {unit})"
    if found.times is None or found.reached is None:
        return f"{name} does not reach {goal}.{_bounds(interval)}"
    return f"{name} needs {_times(found.times)} to reach {goal}: {found.reached:,.0f}.{_bounds(interval)}"


def _times(saved: float) -> str:
    """How much compute a saving of `saved` times leaves."""
    share = 1 / saved
    if round(share, 1) == 1:
        return "as much compute"
    return f"{share:.1f} times the compute" if share > 0.15 else f"1/{saved:.0f} of the compute"


def _bounds(interval: Spread | None) -> str:
    """What other prompts might give, in one sentence."""
    if interval is None:
        return " Other prompts might leave nothing to reach."
    fewer, more = interval.high, interval.low  # times saved
    missed = f"; in {interval.missed:.0%} of resamples it is not reached" if interval.missed else ""
    if not fewer:
        return " Nor do other prompts, resampled, reach it."
    most = f"{1 / more:.1f} times" if more else "any amount"
    return f" Over resampled prompts: {1 / fewer:.1f} times to {most}{missed}."
