"""How much less training compute one method needs to be as good as another, from their two curves.

A curve has a point for each saved checkpoint; scores between two checkpoints are unknown. So the figure has a bound:
its value if the level was reached right after the checkpoint before. Its interval comes from resampled prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scores = Mapping[str, Array]  # for each metric (checkpoints, prompts)


@dataclass(frozen=True)
class Point:
    """A checkpoint: the compute of training so far, and its validation score."""

    compute: float  # > 0: UNet forwards, or seconds
    score: float
    kept: bool = True  # False if a guarded score has fallen; such a point does not count


@dataclass(frozen=True)
class Saving:
    """`times` less compute than the other needs for its best; None if that was not reached."""

    level: float  # the other's best score
    compute: float  # of the other at that score
    reached: float | None  # compute of the first checkpoint that is as good
    times: float | None
    at_most: float | None  # None also if the first checkpoint is as good: there is no bound then


def saving(curve: Sequence[Point], other: Sequence[Point], *, base: float) -> Saving | None:
    """Compare the curve with the other's best; None if the other has nothing better than the base's score.

    Both curves are in the order of training.
    """
    better = [point for point in other if point.kept and point.score > base]
    if not better:
        return None
    best = max(better, key=lambda point: point.score)
    for i, point in enumerate(curve):
        if point.kept and point.score >= best.score:
            bound = best.compute / curve[i - 1].compute if i else None
            return Saving(best.score, best.compute, point.compute, best.compute / point.compute, bound)
    return Saving(best.score, best.compute, None, None, None)


@dataclass(frozen=True)
class Spread:
    """The factor over resampled prompts in which there is something to reach; 0 stands for not reached."""

    low: float
    high: float
    missed: float  # share of resamples in which the level was not reached


def points(compute: Sequence[float], scores: Scores, base: Scores, weights: Array, *, tolerance: float) -> list[Point]:
    """A curve of means over prompts with weights (prompts,); the first metric is primary, the others are guarded.

    base: for each metric (1, prompts). A point is kept if no guarded mean is below the base's by more than `tolerance`.
    """
    share = weights / weights.sum()
    primary, *guarded = scores
    means = scores[primary] @ share
    falls = [(base[metric] - scores[metric]) @ share for metric in guarded]
    worst = np.max(falls, axis=0) if falls else np.zeros(len(means))
    return [Point(*each) for each in zip(compute, means.tolist(), (worst <= tolerance).tolist(), strict=True)]


def spread(
    curve: tuple[Sequence[float], Scores],
    other: tuple[Sequence[float], Scores],
    base: Scores,
    *,
    tolerance: float,
    samples: int = 1000,
    seed: int = 0,
) -> Spread | None:
    """The 95% interval of `saving(...).times` over prompts; a curve is its compute and its scores.

    None if the other is better than the base in fewer than half of the resamples.
    """
    primary = next(iter(base))
    num = base[primary].shape[1]
    rng = np.random.default_rng(seed)
    times = []
    for weights in rng.multinomial(num, np.full(num, 1 / num), size=samples).astype(np.float64):
        both = [points(*each, base, weights, tolerance=tolerance) for each in (curve, other)]
        found = saving(*both, base=float(base[primary][0] @ weights / num))
        if found is not None:
            times.append(found.times or 0.0)
    if len(times) < samples / 2:
        return None
    low, high = np.quantile(times, [0.025, 0.975])
    return Spread(float(low), float(high), float(np.mean(np.array(times) == 0)))
