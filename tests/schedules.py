"""Stable Diffusion's schedule and grids, as diffusers makes them."""

from diffusers import DDIMScheduler
from torch import Tensor

from spo.core.schedule import VariancePreserving


def stable_diffusion(**changes) -> VariancePreserving:
    """The schedule of 1000 timesteps, float32; `changes` go to diffusers' DDIMScheduler."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **changes}
    return VariancePreserving(DDIMScheduler(**settings).alphas_cumprod)


def grid(steps: int, *, steps_offset: int = 1) -> Tensor:
    """(steps,) timesteps, descending."""
    scheduler = DDIMScheduler(steps_offset=steps_offset)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


def previous(t: Tensor, *, steps: int) -> Tensor:
    """The timestep after t in sampling; the published code does not go below 0."""
    return (t - 1000 // steps).clamp(min=0)
