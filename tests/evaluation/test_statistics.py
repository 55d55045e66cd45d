"""Laws of the bootstrap intervals."""

import numpy as np
import pytest

from spo.evaluation.statistics import mean_interval, paired_difference


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def width(interval) -> float:
    return interval.high - interval.low


def test_interval_of_a_constant_is_that_constant():
    interval = mean_interval([0.1] * 12, range(12))
    assert interval.low == interval.mean == interval.high
    assert (interval.mean, interval.n) == (0.1, 12)


def test_constant_gain_is_certain(rng):
    base = rng.integers(0, 64, 30) / 64
    result = paired_difference(base + 0.25, base, range(30))
    assert (result.low, result.difference, result.high) == (0.25, 0.25, 0.25)
    assert (result.win_rate_low, result.win_rate, result.win_rate_high) == (1, 1, 1)
    assert (result.ties, result.n) == (0, 30)


def test_interval_agrees_with_the_normal_one_on_many_prompts(rng):
    values = rng.normal(2.0, 1.0, 400)
    interval = mean_interval(values, range(400))
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)


def test_95_percent_of_intervals_hold_the_true_mean_of_clustered_skewed_scores(rng):
    prompts, images, runs = 80, 3, 400
    groups = np.repeat(np.arange(prompts), images).tolist()
    held = 0
    for run in range(runs):
        values = np.repeat(rng.exponential(1.0, prompts), images) + rng.normal(0, 0.5, prompts * images)
        interval = mean_interval(values, groups, samples=500, seed=run)
        held += interval.low <= 1.0 <= interval.high
    assert 0.91 <= held / runs <= 0.98


@pytest.mark.parametrize("of_seeds", [0.1, 1.0])
@pytest.mark.parametrize("num_seeds", [2, 5])
def test_95_percent_of_intervals_hold_the_true_gain_whatever_share_of_chance_is_the_seeds(rng, num_seeds, of_seeds):
    prompts, runs, held = 40, 200, 0
    for run in range(runs):
        luck = rng.normal(0, of_seeds, (num_seeds, 1))
        trained = 1.0 + luck + rng.normal(0, 1, prompts) + rng.normal(0, 0.5, (num_seeds, prompts))
        result = paired_difference(trained, np.zeros(prompts), range(prompts), samples=200, seed=run)
        held += result.low <= 1.0 <= result.high
    assert held / runs >= 0.91  # with few seeds and little luck it errs to the wide side


def test_seeds_that_agree_leave_the_prompts_interval_and_seeds_that_differ_widen_it(rng):
    base, gain = rng.normal(0, 1, 50), rng.normal(0.2, 0.1, 50)
    one = paired_difference(base + gain, base, range(50))
    same = paired_difference([base + gain] * 3, base, range(50))
    apart = paired_difference([base + gain + shift for shift in (-0.1, 0.0, 0.1)], base, range(50))
    assert (same.low, same.high) == pytest.approx((one.low, one.high))
    assert (same.difference, apart.difference) == pytest.approx((one.difference,) * 2)
    assert width(apart) > 5 * width(same)
    assert (one.n, same.n) == (50, 150)


def test_every_training_of_one_side_meets_every_one_of_the_other(rng):
    a, b = rng.normal(0.1, 1, (3, 30)), rng.normal(0, 1, (2, 30))
    forth, back = paired_difference(a, b, range(30)), paired_difference(b, a, range(30))
    assert forth.n == 3 * 2 * 30
    assert forth.difference == pytest.approx(a.mean() - b.mean())
    assert forth.win_rate == pytest.approx((a[:, None] > b[None]).mean())
    assert back.difference == pytest.approx(-forth.difference)


def test_a_win_rate_stays_one(rng):
    trained = rng.normal(0, 1, (3, 20)) + np.array([[-2.0], [0.0], [3.0]])
    result = paired_difference(trained, np.zeros(20), range(20))
    assert 0 <= result.win_rate_low < result.win_rate < result.win_rate_high <= 1


def test_pairing_is_narrower_than_comparing_unrelated_images(rng):
    difficulty = rng.normal(0, 1, 100)
    base = difficulty + rng.normal(0, 0.1, 100)
    tuned = difficulty + rng.normal(0.1, 0.1, 100)
    paired = paired_difference(tuned, base, range(100))
    unpaired = paired_difference(rng.permutation(tuned), base, range(100))
    assert width(paired) < width(unpaired) / 4
    assert paired.low > 0 > unpaired.low
    assert paired.difference == pytest.approx(unpaired.difference)


def test_clustering_is_wider_than_naive_where_images_of_a_prompt_are_alike(rng):
    values = np.repeat(rng.normal(0, 1, 50), 4) + rng.normal(0, 0.1, 200)
    clustered = mean_interval(values, np.repeat(np.arange(50), 4).tolist())
    naive = mean_interval(values, range(200))
    assert width(clustered) == pytest.approx(2 * width(naive), rel=0.15)  # sqrt(4 images)
    assert clustered.mean == pytest.approx(naive.mean)


def test_ties_count_half():
    result = paired_difference([1, 2, 3, 0], [1, 1, 3, 1], "abcd")
    assert result.ties == 2
    assert result.win_rate == 0.5


def test_swapping_the_sides_negates_the_difference(rng):
    a, b = rng.normal(size=(2, 40))
    forth, back = paired_difference(a, b, range(40)), paired_difference(b, a, range(40))
    assert back.difference == -forth.difference
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))
    assert back.win_rate == pytest.approx(1 - forth.win_rate)


def test_same_seed_same_interval_and_other_seed_another(rng):
    values = rng.normal(size=50)
    assert mean_interval(values, range(50), seed=3) == mean_interval(values, range(50), seed=3)
    assert mean_interval(values, range(50), seed=3) != mean_interval(values, range(50), seed=4)


def test_names_of_groups_do_not_matter(rng):
    values = rng.normal(size=12)
    numbers = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    words = [f"prompt {9 - i}" for i in numbers]
    assert mean_interval(values, numbers) == mean_interval(values, words)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0, 2.0], ["a", "a"]), "at least 2 prompts, got 1"),
        (lambda: mean_interval([1.0, float("nan")], "ab"), "1 of 2 entries not finite, the first at 1"),
        (lambda: paired_difference([1.0, 2.0], [1.0], "ab"), "a has 2 values and b has 1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
