"""Score against compute: what each method's checkpoints cost, and how much less one needs than another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from spo.evaluation.cost import Point, Saving, saving
from spo.stages.report_results import BASE, Results

Row = dict[str, Any]
CURRENCIES = {"unet_forwards": "UNet forwards", "seconds": "seconds of alignment"}  # as checkpoints tell them
WITH_JUDGE = "seconds_with_judge"
UNITS = {**CURRENCIES, WITH_JUDGE: "seconds, the preference model's training included"}


@dataclass(frozen=True)
class Duel:
    """How much compute one method saves against another, in one currency, and what is said of it."""

    method: str
    other: str
    currency: str
    saving: Saving | None
    sentence: str


def duels(
    results: Results, validation: Sequence[Row], *, tolerance: float, judge_seconds: Mapping[str, float]
) -> list[Duel]:
    """Each pair of methods in each currency, read off the means of their training seeds.

    judge_seconds: what training the preference model took, for each method that needs one.
    """
    base = next((row for row in validation if row["column"] == BASE), None)
    if base is None or results.primary not in base:
        return []
    found = []
    for name, other in combinations(results.methods, 2):
        for currency in UNITS if any(judge_seconds.values()) else CURRENCIES:
            curves = [
                curve(results, validation, method, currency, base, tolerance, judge_seconds.get(method, 0.0))
                for method in (name, other)
            ]
            if not all(curves):
                continue
            found.append(_duel(results, name, other, currency, saving(*curves, base=base[results.primary])))
            if found[-1].saving is None:  # nothing to reach, whatever one counts in
                break
    return found


def curve(
    results: Results,
    validation: Sequence[Row],
    method: str,
    currency: str,
    base: Row,
    tolerance: float,
    judge_seconds: float,
) -> list[Point]:
    """The method's checkpoints, each the mean of its training seeds; a score is kept if no guarded one fell."""
    points = []
    for rows in by_checkpoint(validation, method):
        falls = [base[metric] - fmean(row[metric] for row in rows) for metric in results.guarded]
        if currency == WITH_JUDGE:
            compute = fmean(row["seconds"] for row in rows) + judge_seconds
        else:
            compute = fmean(row[currency] for row in rows)
        score = fmean(row[results.primary] for row in rows)
        points.append(Point(compute, score, kept=max(falls, default=0.0) <= tolerance))
    return [point for point in points if point.compute > 0]


def by_checkpoint(validation: Sequence[Row], method: str) -> list[list[Row]]:
    """The rows of a method's seeds, together by their place in training; those that all seeds have."""
    seeds: dict[Any, list[Row]] = {}
    for row in validation:
        if row["column"] == method:
            seeds.setdefault(row["training_seed"], []).append(row)
    return [list(rows) for rows in zip(*seeds.values(), strict=False)]


def sentences(found: Sequence[Duel]) -> list[str]:
    return [duel.sentence for duel in found]


def numbers(found: Sequence[Duel]) -> dict[str, dict[str, float]]:
    """times_less_<currency> of each pair; a level that was not reached has no number."""
    table: dict[str, dict[str, float]] = {}
    for duel in found:
        if duel.saving is not None and duel.saving.times is not None:
            pair = table.setdefault(f"{duel.method}_vs_{duel.other}", {})
            pair[f"times_less_{duel.currency}"] = round(duel.saving.times, 3)
    return table


def _duel(results: Results, name: str, other: str, currency: str, found: Saving | None) -> Duel:
    return Duel(name, other, currency, found, _sentence(results.primary, name, other, UNITS[currency], found))


def _sentence(metric: str, name: str, other: str, unit: str, found: Saving | None) -> str:
    if found is None:
        return f"{other} has no checkpoint that is better than the base on validation prompts, so nothing to reach."
    goal = f"{other}'s best validation {metric}, {found.level:.3f} at {found.compute:,.0f} {unit}"
    if found.times is None or found.reached is None:
        return f"{name} does not reach {goal}."
    ratio = f"{found.times:.1f} times less" if found.times >= 1 else f"{1 / found.times:.1f} times more"
    words = f"{name} reaches {goal}, with {ratio} ({found.reached:,.0f}"
    if found.times < 1:
        return f"{words})."
    bound = (
        "its first checkpoint"
        if found.at_most is None
        else f"{found.at_most:.1f} times at the most: checkpoints lie apart"
    )
    return f"{words}; {bound})."
