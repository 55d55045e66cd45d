import pytest
import torch

from spo.core.gaussian import log_prob
from spo.core.step import gaussian_step
from tests.schedules import grid, previous, stable_diffusion


@pytest.mark.parametrize("case", range(5))
def test_transitions_and_their_densities_are_the_published_ones(golden, meta, case):
    settings = meta["cases"][case]
    ours = {name: golden[f"ddim{case}.{name}"] for name in ("model_output", "sample", "prev_sample", "timestep")}
    schedule = stable_diffusion(
        beta_start=settings["beta_start"],
        beta_end=settings["beta_end"],
        beta_schedule=settings["beta_schedule"],
    )
    t = ours["timestep"]
    transition = gaussian_step(
        ours["model_output"],
        ours["sample"],
        t,
        previous(t, steps=settings["num_steps"]),
        schedule=schedule,
        eta=settings["eta"],
        prediction_type=settings["prediction_type"],
    )
    theirs = {name: golden[f"ddim{case}.{name}"] for name in ("mean", "std", "pred_original_sample", "log_prob")}
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(transition.mean, theirs["mean"], **close)
    torch.testing.assert_close(transition.std.flatten(), theirs["std"], **close)
    torch.testing.assert_close(transition.x_0, theirs["pred_original_sample"], **close)
    torch.testing.assert_close(log_prob(transition, ours["prev_sample"]), theirs["log_prob"], **close)


@pytest.mark.parametrize("case", range(5))
def test_the_published_timesteps_lie_on_our_grid(golden, meta, case):
    settings = meta["cases"][case]
    timesteps = grid(settings["num_steps"], steps_offset=settings["steps_offset"])
    assert torch.isin(golden[f"ddim{case}.timestep"], timesteps).all()
