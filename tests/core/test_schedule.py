import pytest
import torch

from spo.core.schedule import RectifiedFlow
from tests.schedules import grid, stable_diffusion

DIFFUSION = stable_diffusion()


def test_diffusion_preserves_variance_and_loses_signal():
    level = DIFFUSION.level(torch.arange(1000))
    torch.testing.assert_close(level.signal**2 + level.noise**2, torch.ones(1000, 1, 1, 1))
    assert (level.signal.flatten().diff() < 0).all()


def test_flow_mixes_signal_and_noise_in_proportion_to_time():
    level = RectifiedFlow().level(torch.tensor([0.0, 250.0, 1000.0]))
    torch.testing.assert_close(level.noise.flatten(), torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(level.signal, 1 - level.noise)


def test_a_time_between_two_timesteps_lies_between_their_levels_and_a_whole_one_is_exact():
    whole = DIFFUSION.level(torch.tensor([7, 8, 999]))
    assert torch.equal(DIFFUSION.level(torch.tensor([7.0, 8.0, 999.0])).signal, whole.signal)
    between = DIFFUSION.level(torch.tensor([7.5])).signal.item()
    assert whole.signal[1].item() < between < whole.signal[0].item()


def test_a_time_below_0_counts_as_0():
    for below in (torch.tensor([-50]), torch.tensor([-50.0])):
        assert torch.equal(DIFFUSION.level(below).noise, DIFFUSION.level(torch.tensor([0])).noise)


@pytest.mark.parametrize("schedule", [DIFFUSION, RectifiedFlow()])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_kept_and_fresh_noise_make_up_the_noise_of_the_next_level(schedule, eta):
    t, t_prev = torch.tensor([951, 501, 101]), torch.tensor([901, 451, 51])
    kept, std = schedule.split_noise(t, t_prev, eta=eta)
    torch.testing.assert_close(kept**2 + std**2, schedule.level(t_prev).noise ** 2)


def test_the_papers_first_branched_timestep_is_751():
    assert grid(20)[4] == 751
