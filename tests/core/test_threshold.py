import pytest
import torch
from diffusers import DDIMScheduler

from spo.core.schedule import RectifiedFlow
from spo.core.threshold import rising_threshold, step_std
from tests.schedules import grid, stable_diffusion


def test_the_std_of_each_step_is_that_of_diffusers():
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(20)
    expected = torch.stack([scheduler._get_variance(t, max(t - 50, 0)).sqrt() for t in scheduler.timesteps.tolist()])
    torch.testing.assert_close(step_std(stable_diffusion(), grid(20), eta=1.0), expected, rtol=1e-3, atol=1e-5)


def test_thresholds_rise_from_low_to_high_with_the_std():
    std = step_std(stable_diffusion(), grid(10), eta=1.0)
    threshold = rising_threshold(std, low=0.35, high=0.5)
    assert threshold[std.argmin()] == pytest.approx(0.35)
    assert threshold[std.argmax()] == pytest.approx(0.5)
    assert torch.equal(threshold.argsort(), std.argsort())


def test_they_do_not_depend_on_eta_nor_on_the_order_of_the_steps():
    std = step_std(stable_diffusion(), grid(10), eta=1.0)
    threshold = rising_threshold(std, low=0.35, high=0.5)
    half = rising_threshold(step_std(stable_diffusion(), grid(10), eta=0.5), low=0.35, high=0.5)
    torch.testing.assert_close(half, threshold, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rising_threshold(std.flip(0), low=0.35, high=0.5), threshold.flip(0))


def test_flow_has_them_too():
    std = step_std(RectifiedFlow(), torch.linspace(1000, 100, 10), eta=1.0)
    assert rising_threshold(std, low=0.2, high=0.4).isfinite().all()


@pytest.mark.parametrize(
    ("std", "low", "high", "message"),
    [
        ([0.1, 0.2], 0.5, 0.4, "must rise"),
        ([0.1, 0.2], -0.1, 0.4, "must rise"),
        ([0.0, 0.0], 0.3, 0.4, "std of all 2 steps is 0"),
    ],
)
def test_wrong_arguments_are_named(std, low, high, message):
    with pytest.raises(ValueError, match=message):
        rising_threshold(torch.tensor(std), low=low, high=high)
