"""Sampling from a Transition, and its log-density."""

import math

from torch import Tensor

from spo.core.precision import at_least_float32
from spo.core.types import Transition


def sample(transition: Transition, noise: Tensor) -> Tensor:
    """x_prev = mean + std * noise: (k, b, c, h, w) for standard normal noise (k, b, c, h, w)."""
    return transition.mean + transition.std * noise


def log_prob(transition: Transition, x_prev: Tensor) -> Tensor:
    """log p(x_prev | x_t) as the MEAN over (c, h, w), in at least float32; SPO's beta has this unit (published code).

    x_prev: (n, c, h, w) -> (n,), or (n, 2, c, h, w) -> (n, 2). The transition's leading axes are (n,) or (n, 1)
    if the x_prev of a row share one Gaussian, (n, 2) or (n * 2,) if each has its own.
    Raises ValueError if the shapes do not fit, or if std is 0 (eta = 0), which has no density.
    """
    lead, latent = x_prev.shape[:-3], x_prev.shape[-3:]
    num_rows, num_each = lead[0], math.prod(lead[1:])
    num_gaussians = transition.mean[..., 0, 0, 0].numel()
    if num_gaussians not in (num_rows, num_rows * num_each):
        raise ValueError(
            f"{num_gaussians} Gaussians do not fit x_prev of shape {tuple(x_prev.shape)}; "
            f"use {num_rows} (shared) or {num_rows * num_each}"
        )
    if not (transition.std > 0).all():
        raise ValueError("std must be positive for a density; sample with eta > 0")
    width = num_each if num_gaussians == num_rows * num_each else 1
    mean = at_least_float32(transition.mean).reshape(num_rows, width, *latent)
    std = at_least_float32(transition.std).reshape(num_rows, width, 1, 1, 1)
    distance = (at_least_float32(x_prev).reshape(num_rows, num_each, *latent) - mean) / std
    log_density = -0.5 * distance**2 - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.mean(dim=(-3, -2, -1)).reshape(lead)
