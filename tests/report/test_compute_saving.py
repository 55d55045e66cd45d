"""How much less compute: what was measured between checkpoints, and no more."""

import numpy as np
import pytest

from spo.report.compute_saving import Point, Saving, points, saving, spread


def curve(*points: tuple[float, float]) -> list[Point]:
    return [Point(*point) for point in points]


def test_the_figure_is_the_first_checkpoint_as_good_and_the_bound_the_one_before():
    ours, other = curve((10, 0.3), (20, 0.5), (30, 0.7)), curve((100, 0.4), (200, 0.6), (300, 0.55))
    assert saving(ours, other, base=0.2) == Saving(level=0.6, compute=200, reached=30, times=200 / 30, at_most=10)


def test_a_first_checkpoint_that_is_as_good_has_no_bound():
    found = saving(curve((10, 0.9)), curve((100, 0.4)), base=0.2)
    assert (found.times, found.at_most) == (10, None)


def test_a_level_never_reached_is_no_figure():
    found = saving(curve((10, 0.3)), curve((100, 0.4)), base=0.2)
    assert (found.level, found.reached, found.times) == (0.4, None, None)


def test_a_method_that_needs_more_has_a_figure_below_one():
    assert saving(curve((400, 0.5)), curve((100, 0.4)), base=0.2).times == 0.25


def test_what_costs_a_guarded_score_is_no_result_of_either_side():
    ours = [Point(10, 0.9, kept=False), Point(20, 0.5)]
    other = [Point(50, 0.8, kept=False), Point(100, 0.4)]
    assert saving(ours, other, base=0.2).times == 5


def test_nothing_is_as_good_as_a_method_that_never_beat_the_base():
    assert saving(curve((10, 0.3)), curve((100, 0.2)), base=0.2) is None


BASE = {"a": np.full((1, 200), 0.5), "b": np.full((1, 200), 0.8)}


def scores(*means: float, guarded: float = 0.8, noise: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    primary = np.array(means)[:, None] + rng.normal(0, noise, (len(means), 200))
    return {"a": primary, "b": np.full((len(means), 200), guarded)}


def test_points_are_the_means_under_the_weights_and_a_fallen_guard_is_not_kept():
    weights = np.zeros(200)
    weights[3] = 2.0
    made = scores(0.6, 0.7, guarded=0.7, noise=0.1)
    found = points([10, 20], made, BASE, weights, tolerance=0.05)
    assert [point.score for point in found] == pytest.approx(made["a"][:, 3])
    assert [point.kept for point in found] == [False, False]
    assert all(point.kept for point in points([10, 20], made, BASE, weights, tolerance=0.11))


def test_without_noise_the_interval_is_the_figure():
    found = spread(([10, 20], scores(0.55, 0.65)), ([40, 80], scores(0.6, 0.55)), BASE, tolerance=0.01)
    assert (found.low, found.high, found.missed) == (2.0, 2.0, 0.0)


def test_the_interval_holds_the_true_saving_and_says_how_often_the_level_is_missed():
    ours, other = ([10, 20, 30], scores(0.55, 0.60, 0.601, noise=0.1)), ([100], scores(0.6, noise=0.1))
    found = spread(ours, other, BASE, tolerance=0.01)
    assert found.low <= 5 <= found.high
    assert 0 < found.missed < 1
    assert found.low == 0  # it is missed more often than one time in forty


def test_a_level_that_is_never_reached_is_zero_and_nothing_to_reach_is_nothing():
    assert spread(([10], scores(0.55)), ([100], scores(0.6)), BASE, tolerance=0.01).missed == 1
    assert spread(([10], scores(0.55)), ([100], scores(0.4)), BASE, tolerance=0.01) is None
