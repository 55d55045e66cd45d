import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spo.config import SamplingConfig
from spo.core.gaussian import log_prob, sample
from spo.core.schedule import Cps, FlowSde, RectifiedFlow
from spo.core.step import gaussian_step
from spo.models.sampler import Sampler
from tests.golden.conftest import GOLDEN

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def flow():
    return load_file(GOLDEN / "flow" / "steps.safetensors") | load_file(GOLDEN / "flow" / "published.safetensors")


def step_of(flow, i, schedule, eta):
    """Our step in the i-th case."""
    t, t_prev = (1000 * flow[f"step.{field}"][i].expand(2) for field in ("sigma", "sigma_next"))
    x_t, output = flow["step.sample"][i], flow["step.model_output"][i]
    return gaussian_step(output, x_t, t, t_prev, schedule=schedule, eta=eta, prediction_type="flow")


@pytest.mark.parametrize("end", ["", "_linspace"])
@pytest.mark.parametrize(
    ("name", "settings", "mu"),
    [
        ("shift1", {"shift": 1.0}, None),
        ("shift3", {"shift": 3.0}, None),
        ("mu0.5", {"shift": 3.0, "use_dynamic_shifting": True}, 0.5),
        ("mu1.15", {"shift": 3.0, "use_dynamic_shifting": True}, 1.15),
    ],
)
def test_grids_are_the_ones_of_diffusers(flow, name, settings, mu, end):
    more = {"sigmas": np.linspace(1, 1 / 10, 10)} if end else {}
    sampler = Sampler.flow(settings, SamplingConfig(steps=10), torch.device("cpu"), mu=mu, **more)
    expected = flow[f"grid.{name}_n10{end}.sigmas"]
    torch.testing.assert_close(sampler.timesteps / 1000, expected[:-1])
    assert expected[-1] == 0
    assert sampler.num_trainable == 9


def test_flow_sde_is_flow_grpos_step(flow):
    for i in range(10):
        step = step_of(flow, i, FlowSde(), 0.7)
        torch.testing.assert_close(step.mean, flow["flow_grpo.mean"][i], **CLOSE)
        torch.testing.assert_close(step.std.flatten(), flow["flow_grpo.std"][i].expand(2), **CLOSE)
        x_prev = step.mean + step.std * flow["step.noise"][i]
        torch.testing.assert_close(log_prob(step, x_prev), flow["flow_grpo.log_prob"][i], rtol=1e-4, atol=1e-4)


def test_cps_is_flow_factorys_step(flow):
    for i in range(10):
        step = step_of(flow, i, Cps(), 0.8)
        torch.testing.assert_close(step.mean, flow["factory_cps.mean"][i], **CLOSE)
        torch.testing.assert_close(step.std.flatten(), flow["factory_cps.std"][i].expand(2), **CLOSE)


def test_flow_sde_alone_leaves_the_marginals(flow):
    """The spread of x' around (1 - sigma') x_0 under an exact model, over sigma': sqrt(kept^2 + std^2) / sigma'."""
    for i in range(9):
        t, t_prev = (1000 * flow[f"step.{field}"][i : i + 1].double() for field in ("sigma", "sigma_next"))
        spread = {}
        for schedule in (RectifiedFlow(), Cps(), FlowSde()):
            kept, std = schedule.split_noise(t, t_prev, eta=0.7)
            spread[type(schedule)] = ((kept**2 + std**2).sqrt() / schedule.level(t_prev).noise).item()
        assert spread[RectifiedFlow] == pytest.approx(1, abs=1e-9)
        assert spread[Cps] == pytest.approx(1, abs=1e-9)
        assert spread[FlowSde] > 1.005


@pytest.mark.parametrize(("name", "eta"), [("eta0", 0.0), ("eta05", 0.5), ("eta1", 1.0)])
def test_steps_of_flow_and_their_densities_are_the_derived_ones(flow, name, eta):
    for i in range(10):
        step = step_of(flow, i, RectifiedFlow(), eta)
        torch.testing.assert_close(step.mean, flow[f"ddim_form_{name}.mean"][i], **CLOSE)
        torch.testing.assert_close(step.std.flatten(), flow[f"ddim_form_{name}.std"][i].expand(2), **CLOSE)
        if eta:
            x_prev = flow[f"ddim_form_{name}.prev_sample"][i]
            torch.testing.assert_close(sample(step, flow["step.noise"][i]), x_prev, **CLOSE)
            if i < 9:
                expected = flow[f"ddim_form_{name}.log_prob"][i]
                torch.testing.assert_close(log_prob(step, x_prev), expected, rtol=1e-4, atol=1e-4)


def test_the_last_step_of_flow_has_no_density(flow):
    step = step_of(flow, 9, RectifiedFlow(), 1.0)
    with pytest.raises(ValueError, match="std must be positive"):
        log_prob(step, flow["step.sample"][9])
