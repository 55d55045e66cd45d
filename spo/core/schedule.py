"""The noise schedule alpha_bar and the grid of timesteps on which DDIM samples.

Equal to diffusers' DDIMScheduler with "leading" spacing, which Stable Diffusion's published settings use.
"""

from typing import Literal

import torch
from torch import Tensor

BetaSchedule = Literal["scaled_linear", "linear"]


def alpha_bar_table(
    *, num_train_timesteps: int, beta_start: float, beta_end: float, schedule: BetaSchedule = "scaled_linear"
) -> Tensor:
    """alpha_bar_t = prod_{s <= t} (1 - beta_s) for every training timestep t (DDPM, arXiv 2006.11239, eq. 4).

    "linear" spaces beta evenly, "scaled_linear" its square root (Stable Diffusion's choice).
    Returns (num_train_timesteps,) float32, falling from nearly 1 to nearly 0.
    Raises ValueError for another schedule.
    """
    if schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    elif schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
    else:
        raise ValueError(f"schedule={schedule!r} is unknown; use 'scaled_linear' or 'linear'")
    return torch.cumprod(1 - betas, dim=0)


def timestep_grid(num_steps: int, *, num_train_timesteps: int, steps_offset: int) -> Tensor:
    """The sampling grid t_i, i = 0..T-1, with "leading" spacing: multiples of N // T, plus the offset.

    num_steps is T, num_train_timesteps is N; steps_offset is 1 in Stable Diffusion's settings.
    Returns (T,) int64, descending. Raises ValueError where the grid would leave [0, N).
    """
    stride = _stride(num_steps, num_train_timesteps)
    first = stride * (num_steps - 1) + steps_offset
    if steps_offset < 0 or first >= num_train_timesteps:
        raise ValueError(
            f"steps_offset={steps_offset} puts timesteps outside [0, {num_train_timesteps}); "
            f"use 0 to {num_train_timesteps - 1 - stride * (num_steps - 1)}"
        )
    return torch.arange(num_steps - 1, -1, -1) * stride + steps_offset


def previous_timestep(t: Tensor, *, num_steps: int, num_train_timesteps: int) -> Tensor:
    """The timestep that follows t (any shape, int) in sampling: max(t - N // T, 0).

    As in the published code, not below 0: diffusers steps to -1 and its `final_alpha_cumprod` there, whereas
    this last step keeps a small std and so a finite log-density.
    """
    return (t - _stride(num_steps, num_train_timesteps)).clamp(min=0)


def _stride(num_steps: int, num_train_timesteps: int) -> int:
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"num_steps={num_steps} must lie between 1 and num_train_timesteps={num_train_timesteps}")
    return num_train_timesteps // num_steps
