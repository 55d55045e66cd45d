"""One rule chooses every method's checkpoint."""

import pytest

from spo.evaluation.checkpoint_selection import choose_checkpoint

BASE = {"aesthetic": 0.5, "alignment": 0.9}


def choose(*means: tuple[float, float], tolerance: float = 0.01) -> int:
    candidates = [{"aesthetic": aesthetic, "alignment": alignment} for aesthetic, alignment in means]
    return choose_checkpoint(candidates, BASE, primary="aesthetic", guarded=["alignment"], tolerance=tolerance)


def test_the_best_primary_score_wins_where_nothing_guarded_fell():
    assert choose((0.55, 0.90), (0.60, 0.91), (0.58, 0.95)) == 1


def test_a_better_primary_score_does_not_pay_for_a_fallen_guarded_one():
    assert choose((0.55, 0.90), (0.70, 0.85)) == 0


def test_a_fall_within_the_tolerance_is_forgiven():
    assert choose((0.55, 0.90), (0.70, 0.895)) == 1


def test_if_all_fell_the_one_that_fell_least_is_taken():
    assert choose((0.80, 0.70), (0.60, 0.88), (0.70, 0.80)) == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_choice_does_not_depend_on_order(order):
    means = [(0.55, 0.90), (0.62, 0.92), (0.70, 0.80)]
    assert means[1] == [means[i] for i in order][choose(*[means[i] for i in order])]
