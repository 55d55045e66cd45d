"""How much less compute: what was measured between checkpoints, and no more."""

from spo.evaluation.cost import Point, Saving, saving


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
