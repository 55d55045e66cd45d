import pytest
import torch

from spo.core.prediction import guide, predict_x_0_and_noise, training_target
from spo.core.schedule import RectifiedFlow, VariancePreserving
from tests.schedules import stable_diffusion

DIFFUSION = VariancePreserving(stable_diffusion().alpha_bar.double())
CASES = [("epsilon", DIFFUSION), ("v_prediction", DIFFUSION), ("sample", DIFFUSION), ("flow", RectifiedFlow())]


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("prediction_type", "schedule"), CASES)
def test_the_right_output_means_the_x_0_and_noise_that_it_was_made_of(prediction_type, schedule):
    x_0, eps = draw(3, 4, 2, 2, seed=0), draw(3, 4, 2, 2, seed=1)
    level = schedule.level(torch.tensor([1, 500, 999]))
    x_t = level.signal * x_0 + level.noise * eps
    output = training_target(x_0, eps, level, prediction_type=prediction_type)
    found = predict_x_0_and_noise(output, x_t, level, prediction_type=prediction_type)
    torch.testing.assert_close(found, (x_0, eps))


@pytest.mark.parametrize(("prediction_type", "schedule"), CASES)
def test_any_output_recomposes_x_t(prediction_type, schedule):
    output, x_t = draw(3, 4, 2, 2, seed=0), draw(3, 4, 2, 2, seed=1)
    level = schedule.level(torch.tensor([1, 500, 999]))
    x_0, eps = predict_x_0_and_noise(output, x_t, level, prediction_type=prediction_type)
    torch.testing.assert_close(level.signal * x_0 + level.noise * eps, x_t)


def test_an_unknown_prediction_type_is_named():
    x, level = draw(1, 1, 1, 1, seed=0), DIFFUSION.level(torch.tensor([5]))
    for call in (training_target, predict_x_0_and_noise):
        with pytest.raises(ValueError, match="prediction_type='x' is unknown; use epsilon, v_prediction, sample or"):
            call(x, x, level, prediction_type="x")


def test_scale_1_is_the_conditional_and_scale_0_the_unconditional_prediction():
    negative, positive = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    torch.testing.assert_close(guide(negative, positive, 1.0), positive)
    torch.testing.assert_close(guide(negative, positive, 0.0), negative)


def test_guidance_extrapolates_linearly():
    negative, positive = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    torch.testing.assert_close(guide(negative, positive, 5.0), torch.tensor([11.0, 33.0]))
