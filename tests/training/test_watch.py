"""The watch: what it measures, and when it ends a run."""

import pytest
import torch

from spo.config import OracleConfig, WatchConfig
from spo.training.history import Cost
from spo.training.watch import Watch


def make_watch(preference=lambda pictures: pictures.mean(dim=(1, 2, 3)), independent=None, **settings) -> Watch:
    config = WatchConfig(**{"every": 2, "metric": OracleConfig(), "score": "aesthetic", **settings})
    return Watch(config, lambda: torch.zeros(4, 3, 2, 2), preference, independent or preference)


def test_it_looks_at_the_start_and_at_every_nth_round_once() -> None:
    watch = make_watch(every=3)
    rows: list[dict[str, float]] = []
    for rounds in (0, 0, 1, 2, 3, 3, 4, 6):
        if watch.is_due(Cost(rounds=rounds), rows):
            rows.append(watch.look(Cost(rounds=rounds), rows)[0])
    assert [row["round"] for row in rows] == [0, 3, 6]


def test_gains_are_standard_deviations_of_the_start_and_the_gap_is_their_difference() -> None:
    scores = iter([[1.0, 3.0], [10.0, 30.0], [4.0, 6.0], [10.0, 30.0]])  # preference, independent; start, then later
    watch = make_watch(lambda pictures: torch.tensor(next(scores)))
    first, _ = watch.look(Cost(), [])
    later, _ = watch.look(Cost(rounds=2), [first])
    assert first["gap"] == 0
    assert later["preference_gain"] == pytest.approx(3.0)  # from 2 to 5, with a deviation of 1
    assert later["independent_gain"] == 0
    assert later["gap"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("values", "patience", "ends"),
    [
        ([0.5, 0.6, 0.59, 0.58], 2, True),
        ([0.5, 0.6, 0.59, 0.61], 2, False),
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.4], 2, True),
        ([0.5, 0.5, 0.5], 2, False),  # no worse
        ([0.5, 0.1, 0.1, 0.1], None, False),
    ],
)
def test_it_ends_a_run_after_so_many_looks_below_the_best(values, patience, ends) -> None:
    watch = make_watch(stop_after_worse=patience)
    assert watch.ends([{"independent": value} for value in values]) is ends
