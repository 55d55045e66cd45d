"""How sure a mean or a comparison is: the paired bootstrap over prompts.

A prompt may have several images, and these resemble each other more than images of other prompts do. So prompts are
resampled, each with all of its images (cluster bootstrap: Davison and Hinkley 1997, section 3.8), and the interval
is that of the percentiles. Two systems are compared on the same prompts and seeds, and resampled together: what makes
a prompt hard for both cancels.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

BLOCK = 4_000_000  # resampled weights held at a time


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie."""

    mean: float
    low: float
    high: float
    n: int  # images


@dataclass(frozen=True)
class Difference:
    """How much higher a scores than b on the same prompts and seeds, and how often."""

    difference: float  # mean of a - b
    low: float
    high: float
    win_rate: float  # share of pairs with a > b; a tie counts half
    win_rate_low: float
    win_rate_high: float
    ties: int
    n: int  # pairs


def mean_interval(
    values: ArrayLike, groups: Sequence[Hashable], *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of values (n,) with its bootstrap interval, resampling groups.

    Args:
        values: (n,) finite scores.
        groups: (n,) the prompt of each value; equal entries are resampled together.
        level: share of such intervals that hold the true mean, in (0, 1).
        samples: how many times to resample.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: values and groups differ in length, a value is not finite, or there are fewer than two groups.
    """
    column = _column("values", values)
    mean, low, high = _intervals(column[:, None], groups, level=level, samples=samples, seed=seed)[:, 0]
    return Interval(float(mean), float(low), float(high), len(column))


def paired_difference(
    a: ArrayLike, b: ArrayLike, groups: Sequence[Hashable], *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Difference:
    """Compare a (n,) with b (n,), whose rows share prompt and seed; both are resampled together.

    If a wins every pair, so does every resample: the win rate's interval is then the point 1.

    Args and errors as in `mean_interval`; ValueError also if a and b differ in length.
    """
    a, b = _column("a", a), _column("b", b)
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values and b has {len(b)}; pair them by prompt and seed")
    gain, win = a - b, (a > b) + 0.5 * (a == b)
    columns = np.stack([gain, win], axis=1)
    mean, low, high = _intervals(columns, groups, level=level, samples=samples, seed=seed)
    return Difference(
        difference=float(mean[0]),
        low=float(low[0]),
        high=float(high[0]),
        win_rate=float(mean[1]),
        win_rate_low=float(low[1]),
        win_rate_high=float(high[1]),
        ties=int((a == b).sum()),
        n=len(a),
    )


def _column(name: str, values: ArrayLike) -> Array:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name} has shape {column.shape}; it should be one column, (n,)")
    bad = ~np.isfinite(column)
    if bad.any():
        raise ValueError(f"{name} has {bad.sum()} of {len(bad)} entries not finite, the first at {bad.argmax()}")
    return column


def _intervals(
    values: Array, groups: Sequence[Hashable], *, level: float, samples: int, seed: int
) -> Array:  # (3, m): mean, low and high of each column of values (n, m)
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, e.g. 0.95")
    if samples < 1:
        raise ValueError(f"samples={samples} must be positive, e.g. 10000")
    if len(groups) != len(values):
        raise ValueError(f"there are {len(values)} values and {len(groups)} groups; give each value its prompt")
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(index) < 2:
        raise ValueError(f"an interval needs at least 2 prompts, got {len(index)}")
    group = np.array([index[each] for each in groups])
    count = np.bincount(group)  # (g,)
    origin = values[0]  # counting from it, a constant column is exactly constant
    sums = np.stack([np.bincount(group, weights=column) for column in (values - origin).T], axis=1)  # (g, m)
    means = np.concatenate([(w @ sums) / (w @ count)[:, None] for w in _weights(len(index), samples, seed)])
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return origin + np.stack([sums.sum(axis=0) / len(values), low, high])


def _weights(num_groups: int, samples: int, seed: int) -> Iterator[Array]:
    """How often each group is drawn in each resample: blocks of (samples, g), rows summing to g."""
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // num_groups)
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        yield rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=size).astype(np.float64)
