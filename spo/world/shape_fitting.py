"""Find the drawing that explains a picture: analysis by synthesis over the shapes of the drawn world.

A picture is modelled as  I = background + T (object - background) + blotches,  T = coverage(signed_distance).
Blotches lie in a known space of 25 smooth fields and are treated as Gaussian noise of that covariance. So inner
products are taken after whitening: y - U (1 - sqrt(lambda / (d^2 + lambda))) U^T y, with the fields' singular vectors
U and values d. Blotches then hardly move the fit.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.world.scenes import OFFSET, REFERENCE_SIDE, SHAPES, coverage, pixel_grid, signed_distance

BANK_SIDE, FIT_SIDE = 16, 32  # sides of the search for a start and of the comparison of shapes
FIT_STEPS, FINE_STEPS = 5, 2
NOISE_RATIO = 0.1  # lambda at 64 px: variance of a pixel's error over that of a blotch
RADII, SOFTNESSES = (0.10, 0.42), (0.25, 9.0)  # what a fit may reach


@dataclass(frozen=True)
class Drawing:
    """The best drawing of each picture; lengths are shares of the side, softness is in pixels at 64 px."""

    misfit: Tensor  # (n, shapes) share of the picture's structure that each shape leaves unexplained
    shape: Tensor  # (n,) int: the best of SHAPES
    x: Tensor  # (n,) centre
    y: Tensor  # (n,)
    radius: Tensor  # (n,)
    softness: Tensor  # (n,)
    mask: Tensor  # (n, h, w) coverage by the best drawing
    inside: Tensor  # (n, 3) the object's colour
    outside: Tensor  # (n, 3) the background's colour


@lru_cache(maxsize=8)
def blotch_fields(side: int) -> tuple[Tensor, Tensor]:
    """Orthonormal fields U (side^2, 25) that span the blotches, and their singular values (25,)."""
    fields = F.interpolate(torch.eye(25).view(25, 1, 5, 5), size=(side, side), mode="bicubic", align_corners=True)
    u, d, _ = torch.linalg.svd(fields.flatten(1).T, full_matrices=False)
    return u.contiguous(), d


@lru_cache(maxsize=8)
def _excess(side: int) -> Tensor:
    """(25,) share of the variance in each blotch field that is the blotches' own: d^2 / (d^2 + lambda)."""
    _, d = blotch_fields(side)
    return d**2 / (d**2 + NOISE_RATIO * (side / REFERENCE_SIDE) ** 2)


def whiten(y: Tensor, side: int) -> Tensor:
    """Fields y (..., side^2) with the blotches' share taken down to a pixel error's."""
    u, _ = blotch_fields(side)
    return y - ((y @ u) * (1 - (1 - _excess(side)).sqrt())) @ u.T


@lru_cache(maxsize=1)
def _bank() -> tuple[Tensor, Tensor]:
    """Whitened unit templates (shapes, t, side^2) free of the constant, and their centre and radius (t, 3)."""
    centres = torch.linspace(-1.2 * OFFSET, 1.2 * OFFSET, 11)
    table = torch.cartesian_prod(centres, centres, torch.tensor([0.14, 0.175, 0.22, 0.27, 0.33]))
    grid_x, grid_y = pixel_grid(len(table), BANK_SIDE)
    x, y, radius = (column.view(-1, 1, 1) for column in table.T)
    softness = torch.full((len(table),), 4.0)
    distances = [
        signed_distance(torch.full((len(table),), s), grid_x - x, grid_y - y, radius) for s in range(len(SHAPES))
    ]
    templates = torch.stack([coverage(distance, softness) for distance in distances]).flatten(2)
    one = F.normalize(whiten(torch.ones(BANK_SIDE**2), BANK_SIDE), dim=0)
    templates = whiten(templates, BANK_SIDE)
    templates = templates - (templates @ one)[..., None] * one
    return F.normalize(templates, dim=-1), table


def _regress(mask: Tensor, values: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Least squares of values (n, c, side^2) on 1 and mask (n, side^2), whitened: intercepts, slopes (n, c)."""
    one = whiten(torch.ones(side**2), side).expand(len(mask), -1)
    design = torch.stack([one, whiten(mask, side)], dim=2)  # (n, side^2, 2)
    gram = design.mT @ design + 1e-6 * torch.eye(2)
    solution = torch.linalg.solve(gram, design.mT @ whiten(values, side).mT)  # (n, 2, c)
    return solution[:, 0], solution[:, 1]


def _draw(shape: Tensor, parameters: Tensor, side: int) -> Tensor:
    """Columns (n, 6, side, side): a constant 1, the coverage, and its derivatives by the four parameters.

    parameters: (n, 4) of centre x and y, log radius and log softness.
    """
    n = len(shape)
    x, y, log_radius, log_softness = (column.view(n, 1, 1) for column in parameters.T)
    grid_x, grid_y = pixel_grid(n, side)
    off_x, off_y = grid_x - x, grid_y - y
    softness = log_softness.exp()
    distance = signed_distance(shape, off_x, off_y, log_radius.exp())
    mask = coverage(distance, softness.view(n))
    slope_x, slope_y = torch.zeros_like(mask), torch.zeros_like(mask)
    slope_x[:, :, 1:-1] = (mask[:, :, 2:] - mask[:, :, :-2]) * (side / 2)
    slope_y[:, 1:-1] = (mask[:, 2:] - mask[:, :-2]) * (side / 2)
    by_softness = mask * (1 - mask) * distance * (REFERENCE_SIDE / 0.6) / softness
    columns = torch.ones(n, 6, side, side)
    columns[:, 1] = mask
    columns[:, 2], columns[:, 3] = -slope_x, -slope_y
    # distances are homogeneous in (x, y, radius), so Euler's theorem gives the derivative by the radius
    columns[:, 4] = -by_softness - off_x * slope_x - off_y * slope_y
    columns[:, 5] = by_softness
    return columns


def _step(shape: Tensor, parameters: Tensor, target: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Misfit (n,) at the parameters and the damped Gauss-Newton step (n, 4) from there; target (n, side^2) is whitened.

    Misfit: the residual of constant and drawing, as a share of the residual of the constant alone.
    """
    columns = _draw(shape, parameters, side).flatten(2)
    shares = columns @ blotch_fields(side)[0]
    gram = columns @ columns.mT - (shares * _excess(side)) @ shares.mT  # of the whitened columns, (n, 6, 6)
    moment = (columns @ whiten(target, side)[:, :, None])[:, :, 0]  # (n, 6)
    line = torch.linalg.solve(gram[:, :2, :2] + 1e-6 * torch.eye(2), moment[:, :2])  # intercept, contrast
    energy = target.square().sum(dim=1)
    structure = energy - moment[:, 0] ** 2 / gram[:, 0, 0]
    misfit = ((energy - (line * moment[:, :2]).sum(dim=1)) / structure.clamp_min(1e-9)).clamp(0, 1)
    # the drawing moves by contrast times its derivatives
    scale = torch.cat([torch.ones(len(line), 2), line[:, 1:].expand(-1, 4)], dim=1)
    residual = (moment - (gram[:, :, :2] @ line[:, :, None])[:, :, 0]) * scale
    gram = gram * scale[:, :, None] * scale[:, None, :]
    damped = gram + torch.diag_embed(0.01 * gram.diagonal(dim1=1, dim2=2) + 1e-6)
    limit = torch.tensor([0.05, 0.05, 0.2, 0.6])
    step = torch.linalg.solve(damped, residual)[:, 2:]
    return misfit, torch.maximum(torch.minimum(step, limit), -limit)


def _refine(shape: Tensor, parameters: Tensor, target: Tensor, side: int, steps: int) -> tuple[Tensor, Tensor]:
    """The best misfit (n,) met in some Gauss-Newton steps, and its parameters (n, 4)."""
    low = torch.tensor([-0.4, -0.4, math.log(RADII[0]), math.log(SOFTNESSES[0])])
    high = torch.tensor([0.4, 0.4, math.log(RADII[1]), math.log(SOFTNESSES[1])])
    best, best_misfit = parameters, torch.full((len(shape),), torch.inf)
    for _ in range(steps + 1):
        misfit, step = _step(shape, parameters, target, side)
        better = misfit < best_misfit
        best_misfit = torch.where(better, misfit, best_misfit)
        best = torch.where(better[:, None], parameters, best)
        parameters = torch.maximum(torch.minimum(parameters + step, high), low)
    return best_misfit, best


def _start(images: Tensor) -> tuple[Tensor, Tensor]:
    """For each shape the best template of the bank: parameters (n, shapes, 4), and the main colour axis (n, 3)."""
    n = len(images)
    small = F.adaptive_avg_pool2d(images, BANK_SIDE).flatten(2)  # (n, 3, side^2)
    templates, table = _bank()
    explained = (whiten(small, BANK_SIDE) @ templates.flatten(0, 1).T).square().sum(1)
    best = explained.view(n, len(SHAPES), -1).max(dim=2)
    x, y, radius = table[best.indices].unbind(2)
    parameters = torch.stack([x, y, radius.log(), torch.full_like(x, math.log(2.0))], dim=2)
    shape = best.values.argmax(1)
    mask = _draw(shape, parameters[torch.arange(n), shape], BANK_SIDE)[:, 1]
    _, axis = _regress(mask.flatten(1), small, BANK_SIDE)
    return parameters, axis


def trace(images: Tensor) -> Drawing:
    """The drawing that explains each of images (n, 3, side, side) in [0, 1] best."""
    n, _, side, _ = images.shape
    start, axis = _start(images)
    axis = F.normalize(axis, dim=1)
    projected = torch.einsum("nchw,nc->nhw", images, axis)
    projected = projected - projected.mean(dim=(1, 2), keepdim=True)
    middle = F.adaptive_avg_pool2d(projected[:, None], FIT_SIDE).flatten(1)
    shapes = torch.arange(len(SHAPES)).repeat(n)
    target = whiten(middle, FIT_SIDE).repeat_interleave(len(SHAPES), dim=0)
    misfit, parameters = _refine(shapes, start.flatten(0, 1), target, FIT_SIDE, FIT_STEPS)
    misfit = misfit.view(n, -1)
    shape = misfit.argmin(1)
    chosen = parameters.view(n, len(SHAPES), 4)[torch.arange(n), shape]
    fine_misfit, chosen = _refine(shape, chosen, whiten(projected.flatten(1), side), side, FINE_STEPS)
    mask = _draw(shape, chosen, side)[:, 1]
    outside, contrast = _regress(mask.flatten(1), images.flatten(2), side)
    x, y, log_radius, log_softness = chosen.T
    best = torch.arange(len(SHAPES)) == shape[:, None]
    misfit = torch.where(best, fine_misfit[:, None], misfit)
    return Drawing(misfit, shape, x, y, log_radius.exp(), log_softness.exp(), mask, outside + contrast, outside)
