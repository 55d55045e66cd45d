import pytest
import torch
from safetensors.torch import load_file

from spo.core.gaussian import log_prob, sample
from spo.core.schedule import RectifiedFlow
from spo.core.step import gaussian_step
from tests.golden.conftest import GOLDEN

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def flow():
    return load_file(GOLDEN / "flow" / "steps.safetensors")


@pytest.mark.parametrize(("name", "eta"), [("eta0", 0.0), ("eta05", 0.5), ("eta1", 1.0)])
def test_steps_of_flow_and_their_densities_are_the_derived_ones(flow, name, eta):
    for i in range(10):
        t, t_prev = (1000 * flow[f"step.{field}"][i].expand(2) for field in ("sigma", "sigma_next"))
        step = gaussian_step(
            flow["step.model_output"][i],
            flow["step.sample"][i],
            t,
            t_prev,
            schedule=RectifiedFlow(),
            eta=eta,
            prediction_type="flow",
        )
        torch.testing.assert_close(step.mean, flow[f"ddim_form_{name}.mean"][i], **CLOSE)
        torch.testing.assert_close(step.std.flatten(), flow[f"ddim_form_{name}.std"][i].expand(2), **CLOSE)
        if eta:
            x_prev = flow[f"ddim_form_{name}.prev_sample"][i]
            torch.testing.assert_close(sample(step, flow["step.noise"][i]), x_prev, **CLOSE)
            if i < 9:
                expected = flow[f"ddim_form_{name}.log_prob"][i]
                torch.testing.assert_close(log_prob(step, x_prev), expected, rtol=1e-4, atol=1e-4)


def test_the_last_step_of_flow_has_no_density(flow):
    t, t_prev = (1000 * flow[f"step.{field}"][9].expand(2) for field in ("sigma", "sigma_next"))
    x = flow["step.sample"][9]
    step = gaussian_step(x, x, t, t_prev, schedule=RectifiedFlow(), eta=1.0, prediction_type="flow")
    with pytest.raises(ValueError, match="std must be positive"):
        log_prob(step, x)
