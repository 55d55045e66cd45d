import diffusers
import pytest
import torch

from spo.core.schedule import alpha_bar_table, previous_timestep, timestep_grid

STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_alpha_bar_is_diffusers(schedule):
    theirs = diffusers.DDIMScheduler(**STABLE_DIFFUSION, beta_schedule=schedule).alphas_cumprod
    assert torch.equal(alpha_bar_table(**STABLE_DIFFUSION, schedule=schedule), theirs)


@pytest.mark.parametrize("num_steps", [1, 7, 10, 20, 50])
def test_grid_is_diffusers_leading_grid(num_steps):
    scheduler = diffusers.DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(num_steps)
    assert torch.equal(timestep_grid(num_steps, num_train_timesteps=1000, steps_offset=1), scheduler.timesteps)


def test_the_papers_first_branched_timestep_is_751():
    assert timestep_grid(20, num_train_timesteps=1000, steps_offset=1)[4] == 751


@pytest.mark.parametrize("num_steps", [1, 7, 10, 20, 50])
def test_previous_timestep_is_the_next_of_the_grid_and_0_at_its_end(num_steps):
    grid = timestep_grid(num_steps, num_train_timesteps=1000, steps_offset=1)
    following = torch.cat([grid[1:], torch.tensor([0])])
    assert torch.equal(previous_timestep(grid, num_steps=num_steps, num_train_timesteps=1000), following)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="schedule='cosine' is unknown; use 'scaled_linear' or 'linear'"):
        alpha_bar_table(**STABLE_DIFFUSION, schedule="cosine")
    with pytest.raises(ValueError, match="num_steps=0 must lie between 1 and num_train_timesteps=1000"):
        timestep_grid(0, num_train_timesteps=1000, steps_offset=1)
    with pytest.raises(ValueError, match=r"steps_offset=1 puts timesteps outside \[0, 1000\); use 0 to 0"):
        timestep_grid(1000, num_train_timesteps=1000, steps_offset=1)
