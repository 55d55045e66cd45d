import pytest
import torch

from spo.core.ddim import ddim_transition
from spo.core.gaussian import log_prob
from spo.core.schedule import alpha_bar_table, previous_timestep, timestep_grid


@pytest.mark.parametrize("case", range(5))
def test_transitions_and_their_densities_are_the_published_ones(golden, meta, case):
    settings = meta["cases"][case]
    ours = {name: golden[f"ddim{case}.{name}"] for name in ("model_output", "sample", "prev_sample", "timestep")}
    table = alpha_bar_table(
        num_train_timesteps=1000,
        beta_start=settings["beta_start"],
        beta_end=settings["beta_end"],
        schedule=settings["beta_schedule"],
    )
    t = ours["timestep"]
    t_prev = previous_timestep(t, num_steps=settings["num_steps"], num_train_timesteps=1000)
    transition = ddim_transition(
        ours["model_output"],
        ours["sample"],
        table[t],
        table[t_prev],
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
    grid = timestep_grid(settings["num_steps"], num_train_timesteps=1000, steps_offset=settings["steps_offset"])
    assert torch.isin(golden[f"ddim{case}.timestep"], grid).all()
