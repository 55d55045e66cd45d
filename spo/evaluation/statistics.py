"""95% intervals of means and comparisons: the paired bootstrap over prompts, plus the variation of training seeds.

Images of one prompt resemble each other. So prompts are resampled, each with all of its images (cluster bootstrap:
Davison and Hinkley 1997, section 3.8), and the percentiles of the resampled means are the interval. Two systems are
compared on the same prompts and seeds and resampled together, so a prompt that is hard for both cancels.

A method that was trained from several seeds has a score for each image and seed, and its mean is over seeds. Each
resample adds an error for the choice of seeds: Student's t with seeds - 1 degrees of freedom, times the standard error
of the seeds' means. Two to five seeds are too few to resample. With one seed, the interval covers the prompts only.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
QUANTILES = ((1 - 0.95) / 2, 1 - (1 - 0.95) / 2)


@dataclass(frozen=True)
class Interval:
    """A mean and its interval."""

    mean: float
    low: float
    high: float
    n: int  # images


@dataclass(frozen=True)
class Difference:
    """By how much and how often a scores higher than b on the same prompts and image seeds."""

    difference: float  # mean of a - b
    low: float
    high: float
    win_rate: float  # share of pairs with a > b; a tie counts half
    win_rate_low: float
    win_rate_high: float
    ties: int
    n: int  # images, or pairs of images


def mean_interval(values: ArrayLike, groups: Sequence[Hashable], *, samples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of values (n,), or (s, n) of s training seeds, with its bootstrap interval.

    groups: (n,) the prompt of each value; equal entries are resampled together, `samples` times. The same `seed` gives
    the same interval. ValueError if a value is not finite, or there are fewer than two groups.
    """
    table = _table("values", values)
    seed_means = [table.mean(axis=1)[:, None]]
    [mean, low, high] = _intervals(table.mean(axis=0)[:, None], groups, seed_means, samples, seed)
    return Interval(float(mean[0]), float(low[0]), float(high[0]), table.size)


def paired_difference(
    a: ArrayLike, b: ArrayLike, groups: Sequence[Hashable], *, samples: int = 10_000, seed: int = 0
) -> Difference:
    """Compare a with b, (n,) or (seeds, n) each; columns share prompt and image seed and are resampled together.

    Trainings of a and b are independent, so each seed of a is compared with each of b. If a wins every pair, the win
    rate's interval is the point 1. Otherwise like `mean_interval`; ValueError also if a and b differ in length.
    """
    a, b = _table("a", a), _table("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} values and b has {b.shape[1]}; pair them by prompt and seed")
    gain = a[:, None] - b[None]  # (seeds of a, seeds of b, n)
    win = (gain > 0) + 0.5 * (gain == 0)
    both = np.stack([gain, win], axis=-1)  # (seeds of a, seeds of b, n, 2)
    seed_means = [both.mean(axis=(1, 2)), both.mean(axis=(0, 2))]
    mean, low, high = _intervals(both.mean(axis=(0, 1)), groups, seed_means, samples, seed)
    return Difference(
        difference=float(mean[0]),
        low=float(low[0]),
        high=float(high[0]),
        win_rate=float(mean[1]),
        win_rate_low=max(0.0, float(low[1])),
        win_rate_high=min(1.0, float(high[1])),
        ties=int((gain == 0).sum()),
        n=gain.size,
    )


def _table(name: str, values: ArrayLike) -> Array:  # (seeds, n)
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    bad = ~np.isfinite(table)
    if bad.any():
        raise ValueError(f"{name} has {bad.sum()} of {bad.size} entries not finite, the first at {bad.argmax()}")
    return table


def _intervals(
    values: Array, groups: Sequence[Hashable], seed_means: Sequence[Array], samples: int, seed: int
) -> Array:
    """(3, m): mean, low and high of each column of values (n, m), which are means over seeds.

    seed_means: for each side of a comparison its seeds' means (seeds, m).
    """
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(index) < 2:
        raise ValueError(f"an interval needs at least 2 prompts, got {len(index)}")
    group = np.array([index[each] for each in groups])
    count = np.bincount(group)  # (g,)
    origin = values[0]  # counting from it, a constant column is exactly constant
    sums = np.stack([np.bincount(group, weights=column) for column in (values - origin).T], axis=1)  # (g, m)
    weights = _weights(len(index), samples, seed)
    means = (weights @ sums) / (weights @ count)[:, None]
    rng = np.random.default_rng([seed, 1])
    for of_seeds in seed_means:
        if (num := len(of_seeds)) > 1:
            error = of_seeds.std(axis=0, ddof=1) / np.sqrt(num)
            means = means + rng.standard_t(num - 1, size=(samples, 1)) * error
    low, high = np.quantile(means, QUANTILES, axis=0)
    return origin + np.stack([sums.sum(axis=0) / len(values), low, high])


@lru_cache(maxsize=1)
def _weights(num_groups: int, samples: int, seed: int) -> Array:
    """How often each resample draws each group, (samples, g); rows sum to g. Kept for the next comparison."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=samples).astype(np.float64)
