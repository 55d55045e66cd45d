import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from spo.errors import TrainingError
from spo.runtime.device import memory_advice
from spo.training.guards import FiniteGuard, StallDetector

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, NAN)])
def test_an_update_that_is_not_finite_is_skipped_counted_and_warned_about_once(
    loss: float, norm: float, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = FiniteGuard(most_in_a_row=10, remedy="")
    assert guard.allows(0.7, 1.0)
    assert not guard.allows(loss, norm)
    assert not guard.allows(loss, norm)
    assert guard.skipped == 2
    assert capsys.readouterr().err.count("an update is skipped") == 1


def test_too_many_in_a_row_end_the_run_with_the_remedy_and_a_good_one_restarts_the_count() -> None:
    guard = FiniteGuard(most_in_a_row=3, remedy="lower the rate")
    for loss in (NAN, NAN, 0.7, NAN, NAN):
        guard.allows(loss, 1.0)
    with pytest.raises(TrainingError, match=r"3 updates in a row.*were skipped; lower the rate"):
        guard.allows(NAN, 1.0)


LEARNS = {"kept": True, "margin": 0.5, "rows": [{"clipped": 0.1}]}


def watched(rounds: list[dict[str, Any]]) -> None:
    watch = StallDetector(3)
    for seen in rounds:
        watch.see(**{**LEARNS, **seen})


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({"kept": False, "rows": []}, "for 3 rounds no pair was kept: .* lower the threshold"),
        ({"margin": 0.0}, "for 3 rounds the preference model has scored all .* alike"),
        ({"rows": [{"clipped": 0.95}]}, "for 3 updates nine of ten ratios were at the clip, .*learning_rate"),
    ],
)
def test_a_stuck_run_is_warned_about_once_with_likely_causes(
    seen: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    watched([seen] * 2)
    assert capsys.readouterr().err == ""
    watched([seen] * 9)
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(f"warning: {said}", line)


def test_a_run_that_learns_is_not_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    stuck = {"kept": False, "margin": 0.0, "rows": [{"clipped": 1.0}]}
    watched([stuck, stuck, {}] * 4 + [{"rows": [{"loss": 0.7}]}] * 9)
    assert capsys.readouterr().err == ""


def _allocate_on_the_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _allocate_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _allocate_in_python() -> None:
    raise MemoryError


@pytest.mark.parametrize("allocate", [_allocate_on_the_cpu, _allocate_on_a_gpu, _allocate_in_python])
def test_running_out_of_memory_names_the_setting_to_change(allocate: Callable[[], None]) -> None:
    with pytest.raises(TrainingError, match=r"^out of memory: lower batch_size, now 64 ") as raised:
        with memory_advice("lower batch_size, now 64"):
            allocate()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), TrainingError("inner advice")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), memory_advice("lower batch_size"):
        raise error


def test_the_first_update_of_a_run_may_already_be_bad() -> None:
    assert not FiniteGuard(most_in_a_row=2, remedy="").allows(math.nan, 0.0)
