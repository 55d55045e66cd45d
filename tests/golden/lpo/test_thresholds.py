"""The published thresholds, and the pairs that they keep."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spo.core.selection import select_pairs
from spo.core.threshold import rising_threshold, step_std
from tests.golden.lpo.conftest import assert_near
from tests.schedules import grid, stable_diffusion

Figures = dict[str, Tensor]
ROUNDED = 1e-4  # what four decimals of their table leave of a std


@pytest.fixture(scope="module")
def std() -> Tensor:
    """Of the 20-step grid, ascending in time as theirs."""
    return step_std(stable_diffusion(), grid(20), eta=1.0).flip(0)


def test_the_std_of_each_step_is_the_published_table(figures: Figures, std: Tensor):
    assert torch.equal(grid(20).flip(0), figures["threshold.timesteps"])
    torch.testing.assert_close(std, figures["threshold.sigma_table"], rtol=0, atol=ROUNDED)
    torch.testing.assert_close(std**2, figures["threshold.variance_table"], rtol=0, atol=ROUNDED)


@pytest.mark.parametrize(("low", "high"), [(0.35, 0.5), (0.45, 0.6)])
def test_rising_thresholds_are_the_published_ones(figures: Figures, std: Tensor, low: float, high: float):
    name = f"{100 * low:.0f}_{100 * high:.0f}"
    for kind, value in (("sigma", std), ("variance", std**2), ("linear", figures["threshold.timesteps"].float())):
        threshold = rising_threshold(value, low=low, high=high)
        torch.testing.assert_close(threshold, figures[f"threshold.{kind}_{name}"], rtol=0, atol=ROUNDED)
    for kind, table in (("sigma", "sigma_table"), ("variance", "variance_table")):  # from their table: to rounding
        threshold = rising_threshold(figures[f"threshold.{table}"], low=low, high=high)
        torch.testing.assert_close(threshold, figures[f"threshold.{kind}_{name}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", range(6))
def test_selected_and_kept_pairs_are_the_published_ones(
    figures: Figures, settings: dict[str, Any], std: Tensor, case: int
):
    given, scores, t = settings["compare"][case], figures[f"compare{case}.scores"], figures[f"compare{case}.timesteps"]
    times = figures["threshold.timesteps"]
    value = {"sigma": std, "variance": std**2, "linear": times.float()}.get(given["kind"])
    if value is None:
        thresholds = torch.full((len(t),), given["threshold"])
    else:
        rising = rising_threshold(value, low=given["threshold_min"], high=given["threshold_max"])
        thresholds = rising[torch.searchsorted(times, t)]
    torch.testing.assert_close(thresholds, figures[f"compare{case}.threshold"], rtol=0, atol=ROUNDED)
    one_by_one = [
        select_pairs(scores[:, j : j + 1], threshold=float(threshold)) for j, threshold in enumerate(thresholds)
    ]
    for field, name in (("win", "win"), ("lose", "lose"), ("keep", "keep")):
        found = torch.cat([getattr(selection, field) for selection in one_by_one])
        assert torch.equal(found, figures[f"compare{case}.{name}"])
    assert_near(torch.cat([selection.margin for selection in one_by_one]), figures[f"compare{case}.gap"])
