"""Thresholds that rise with the step's std (LPO, arXiv 2502.01051).

The candidates of a noisy step differ more than those of a late one. One threshold for all steps keeps too many pairs
of the noisy steps, or too few of the late ones.
"""

import torch
from torch import Tensor

from spo.core.schedule import Schedule


def step_std(schedule: Schedule, timesteps: Tensor, *, eta: float) -> Tensor:
    """std (T,) of each step of a descending grid `timesteps` (T,); the last step ends at time 0."""
    t_prev = torch.cat([timesteps[1:], timesteps.new_zeros(1)])
    return schedule.split_noise(timesteps, t_prev, eta=eta)[1].flatten()


def rising_threshold(std: Tensor, *, low: float, high: float) -> Tensor:
    """Each step's threshold low + (std_t - std_min) / (std_max - std_min) (high - low), (T,) as `std` is.

    The paper uses [.35, .5] for SD v1.5 and [.45, .6] for SDXL. The published code has the std of 20 steps in a table
    of four decimals; here it is that of the grid in use. Its ablations put the variance or the time in the std's place.
    Raises ValueError where low and high are no thresholds, or where all std are equal.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"thresholds from {low} to {high} must rise within [0, 1]; the paper uses .35 to .5")
    least, most = std.min(), std.max()
    if not most > least:
        raise ValueError(f"the std of all {len(std)} steps is {least:g}; thresholds rise only where it differs")
    return low + (std - least) / (most - least) * (high - low)
