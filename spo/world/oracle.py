"""The exact metric of the drawn world: how well a picture is made, and whether it shows what the prompt says.

It uses the pixels and the prompt alone, without a network; training never uses it. `shape_fitting.trace` finds the
drawing that explains a picture best. The drawing and its residual give the finish and the attributes:

    vivid    no veil over the colours, and they are the palette's: neither paler nor more glaring
    crisp    the edges of the fitted drawing are sharp
    clean    no blotches, and nothing else that no drawing has: noise, halos, fringes
    centred  the object is in the middle

Each falls linearly with its flaw, from 1 at none to 0 at the worst that `scenes.draw_quality` draws.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.world.scenes import (
    BACKGROUNDS,
    BLOTCH,
    COLOURS,
    FADE,
    OFFSET,
    PALETTE,
    RADIUS,
    SHAPES,
    SIZES,
    SOFTNESS,
    VEIL,
    Scene,
)
from spo.world.shape_fitting import Drawing, blotch_fields, trace

IMAGES_AT_A_TIME = 64
FACTORS = ("vivid", "crisp", "clean", "centred")
PARTS = {"shape": SHAPES, "colour": BACKGROUNDS, "background": BACKGROUNDS, "size": SIZES}

VEILS = (-0.3, 0.9, 121)  # the grid that is searched; below 0 colours are more glaring than the palette's
GREY_WEIGHT = 0.4  # of errors in lightness against errors in hue: blotches are mostly light and dark
MIXTURE_WEIGHT = 0.15  # of errors of the object's colour towards or away from its background: a small one runs into it
COLOUR_STD, COLOUR_NONE = 0.02, 0.25  # error of a measured colour; distance beyond which it is none of the palette
COLOUR_SLACK, COLOUR_RANGE = 0.05, 0.3  # distance from the palette that is forgiven, and that costs all of vivid
MISFIT_FLOOR, MISFIT_NONE, MISFIT_POWER = 0.004, 0.35, 5  # odds of a shape are misfit^-5; none of them at .35
SIZE_STD = 0.006  # width of the border between small and large
CONTRAST = (0.04, 0.10)  # distance of the object's colour from the background's: not seen, seen
FOREIGN_SLACK, FOREIGN_RANGE = 0.01, 0.15  # RMS that is forgiven of what no drawing has, and that costs all of clean


@torch.no_grad()
def oracle_scores(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Scores of images (n, 3, side, side) in [0, 1] for their n prompts; every value is (n,) in [0, 1], on the CPU.

    aesthetic: mean of vivid, crisp, clean and centred; alignment: mean of those of shape, colour, background and size
    that the prompt names. Both are multiplied by the object's visibility. correct: 1 where every named attribute is
    right. An attribute that the prompt leaves open is 1 and counts nowhere. ValueError for other shapes or prompts.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images have shape {tuple(images.shape)}; they should be (n, 3, side, side)")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts; give one prompt an image")
    scenes = [Scene.parse(prompt) for prompt in prompts]
    starts = range(0, len(images), IMAGES_AT_A_TIME)
    parts = [_scores(images[i : i + IMAGES_AT_A_TIME], scenes[i : i + IMAGES_AT_A_TIME]) for i in starts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _scores(images: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
    pictures = images.detach().float().cpu().nan_to_num(0.0).clamp(0, 1)
    drawing = trace(pictures)
    visible = _visible(drawing)
    vivid, colour, background = _colours(drawing)
    finish = {
        "vivid": vivid,
        "crisp": 1 - (drawing.softness - SOFTNESS[0]) / (SOFTNESS[1] - SOFTNESS[0]),
        "clean": _clean(pictures, drawing),
        "centred": 1 - torch.hypot(drawing.x, drawing.y) / (math.sqrt(2) * OFFSET),
    }
    finish = {name: value.clamp(0, 1) for name, value in finish.items()}
    beliefs = {"shape": _shape(drawing), "colour": colour, "background": background, "size": _size(drawing)}
    parts, named = _answers(beliefs, scenes)
    answered = torch.stack(list(parts.values()), dim=1)  # (n, parts)
    return {
        "aesthetic": torch.stack([finish[name] for name in FACTORS]).mean(dim=0) * visible,
        "alignment": (answered * named).sum(dim=1) / named.sum(dim=1) * visible,
        "correct": ((answered > 0.5).all(dim=1) & (visible > 0.5)).float(),
        **finish,
        **parts,
    }


def _answers(beliefs: dict[str, Tensor], scenes: list[Scene]) -> tuple[dict[str, Tensor], Tensor]:
    """Each part's belief (n,) in the scene's value, 1 where the scene names none; and which are named (n, parts)."""
    parts, named = {}, []
    for part, names in PARTS.items():
        values = [getattr(scene, part) for scene in scenes]
        index = torch.tensor([names.index(value) if value else -1 for value in values], dtype=torch.long)
        belief = beliefs[part].gather(1, index.clamp_min(0)[:, None])[:, 0]
        named.append(index >= 0)
        parts[part] = torch.where(index >= 0, belief, 1.0)
    return parts, torch.stack(named, dim=1)


def _visible(drawing: Drawing) -> Tensor:
    """Visibility (n,) of an object that has contrast and looks like one of the shapes."""
    low, high = CONTRAST
    contrast = (drawing.inside - drawing.outside).norm(dim=1)
    recognised = 1 / (1 + (drawing.misfit.amin(dim=1) / MISFIT_NONE) ** MISFIT_POWER)
    return ((contrast - low) / (high - low)).clamp(0, 1) * recognised


def _shape(drawing: Drawing) -> Tensor:
    """Belief (n, shapes) in each shape, against one another and against none of them."""
    odds = (drawing.misfit + MISFIT_FLOOR) ** -MISFIT_POWER
    return odds / (odds.sum(dim=1, keepdim=True) + MISFIT_NONE**-MISFIT_POWER)


def _size(drawing: Drawing) -> Tensor:
    """Belief (n, 2) in small and large, by the radius."""
    border = (RADIUS[0][1] + RADIUS[1][0]) / 2
    large = torch.sigmoid((drawing.radius - border) / SIZE_STD)
    return torch.stack([1 - large, large], dim=1)


def _colours(drawing: Drawing) -> tuple[Tensor, Tensor, Tensor]:
    """Vivid (n,), and beliefs (n, palette) in the object's and the background's colour.

    Both colours lie under the same veil f: C (1 - f) + VEIL f. The chosen f brings both nearest to the palette. The
    remaining distance also costs vividness, so that contrast or saturation do not count as vivid.
    """
    axis = F.normalize(drawing.inside - drawing.outside, dim=1)[:, None, None]
    palette = torch.tensor(list(PALETTE.values()))
    veil = torch.linspace(*VEILS)
    veiled = palette[:, None] * (1 - veil[:, None]) + VEIL * veil[:, None]  # (palette, veils, 3)

    def squared_distance(colour: Tensor, axis_weight: float) -> Tensor:
        error = colour[:, None, None] - veiled
        error = error - (1 - math.sqrt(axis_weight)) * (error * axis).sum(dim=-1, keepdim=True) * axis
        lightness = error.mean(dim=-1, keepdim=True)
        return (error - lightness).square().sum(dim=-1) + 3 * GREY_WEIGHT * lightness[..., 0].square()

    def belief(cost: Tensor) -> Tensor:
        none = torch.full((len(cost), 1), COLOUR_NONE**2)
        return torch.softmax(-torch.cat([cost, none], dim=1) / (2 * COLOUR_STD**2), dim=1)[:, :-1]

    inside = squared_distance(drawing.inside, MIXTURE_WEIGHT)  # (n, palette, veils)
    outside = squared_distance(drawing.outside, 1.0)
    nearest_inside, nearest_outside = inside[:, : len(COLOURS)].amin(dim=1), outside.amin(dim=1)
    best = (nearest_inside + nearest_outside).min(dim=1)
    excess = (best.values.sqrt() - COLOUR_SLACK).clamp_min(0)
    vivid = 1 - veil[best.indices].abs() / FADE[1] - excess / COLOUR_RANGE
    colour = belief((inside + nearest_outside[:, None]).amin(dim=2))
    background = belief((outside + nearest_inside[:, None]).amin(dim=2))
    return vivid, colour, background


def _clean(pictures: Tensor, drawing: Drawing) -> Tensor:
    """Cleanness (n,) of the residual: blotches, measured in their own fields, and everything else.

    A blotch has variance 1 in lightness and .35^2 in each of two directions of hue (times .6 blotch, see
    `scenes.render`). Hue counts double, since the fitted colours absorb less of it.
    """
    hue_weight, hue_variance = 2.0, 0.35**2
    fields, strength = blotch_fields(pictures.shape[-1])
    contrast = drawing.inside - drawing.outside
    left = pictures - drawing.outside[:, :, None, None] - drawing.mask[:, None] * contrast[:, :, None, None]
    shares = left.flatten(2) @ fields  # (n, 3, 25)
    power = shares.square().sum(dim=1)
    light = shares.sum(dim=1).square() / 3
    weighted = (light + hue_weight * (power - light)) / strength  # (n, 25)
    expected = strength * (1 + hue_weight * 2 * hue_variance)  # of blotches of amplitude 1 / .6
    blotch = (weighted.sum(dim=1) / expected.sum()).sqrt() / 0.6
    foreign = (left.square().sum(dim=(1, 2, 3)) - power.sum(dim=1)).clamp_min(0) / left[0].numel()
    return 1 - blotch / BLOTCH[1] - (foreign.sqrt() - FOREIGN_SLACK).clamp_min(0) / FOREIGN_RANGE
