"""How much less training compute one method needs to be as good as another: a figure read off two curves.

A curve has a point for each saved checkpoint, so what lies between two of them is not known. The figure is what was
measured; the bound is what it could be if the level had been reached right after the checkpoint before. How sure it is
is asked by reading it off again and again with the validation prompts resampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scores = Mapping[str, Array]  # of each metric (checkpoints, prompts)


@dataclass(frozen=True)
class Point:
    """A checkpoint: the compute that training had used by then, and its validation score."""

    compute: float  # > 0: UNet forwards, or seconds
    score: float
    kept: bool = True  # whether its guarded scores have not fallen; only such a point is a result


@dataclass(frozen=True)
class Saving:
    """`times` less compute than the other needs for its best; None where that was not reached."""

    level: float  # the other's best score
    compute: float  # at which the other has it
    reached: float | None  # the compute of the first checkpoint that is as good
    times: float | None
    at_most: float | None  # None also where the first checkpoint is as good already: there is no bound then


def saving(curve: Sequence[Point], other: Sequence[Point], *, base: float) -> Saving | None:
    """Compare the curve with the other's best; None where the other has nothing better than the base's score.

    Both curves in the order of training. The other's best counts from the first checkpoint that has it.
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
    """What the figure is when prompts are resampled, where there is something to reach; 0 stands for not reached."""

    low: float
    high: float
    missed: float  # share of resamples in which the level was not reached


def points(compute: Sequence[float], scores: Scores, base: Scores, weights: Array, *, tolerance: float) -> list[Point]:
    """A curve of means over prompts under weights (prompts,), the first metric being primary and the rest guarded.

    base: of each metric (1, prompts). A point is kept if no guarded mean is below the base's by more than `tolerance`.
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

    None where the other is better than the base in fewer than half of the resamples.
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
