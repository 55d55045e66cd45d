"""How much less training compute one method needs to be as good as another: a figure read off two curves.

A curve has a point for each saved checkpoint, so what lies between two of them is not known. The figure is what was
measured; the bound is what it could be if the level had been reached right after the checkpoint before.
"""

from collections.abc import Sequence
from dataclasses import dataclass


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
