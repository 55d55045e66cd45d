"""The drawn world of the embedded default: prompts, and pictures drawn for them.

A prompt names a colour and a shape, and perhaps a size and a background: "a small red cross on a white background".
A picture of it is drawn by signed-distance functions, with flaws:

    fade      0 .. .6   a pale veil over all colours
    softness  .5 .. 4.5 width of the edges in pixels at 64 px
    blotch    0 .. .18  amplitude of coloured blotches
    dx, dy    +-.18     offset of the object from the centre, as a share of the side

The diffusion models learn from pictures half of which are made with care and half without (`draw_care`), so theirs
differ in finish, too. `spo.world.oracle` measures the flaws; training never uses it.
"""

import math
import re
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

PALETTE = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.12, 0.60, 0.18),
    "blue": (0.12, 0.22, 0.85),
    "yellow": (0.90, 0.82, 0.12),
    "purple": (0.55, 0.12, 0.68),
    "orange": (0.92, 0.48, 0.08),
    "white": (0.95, 0.95, 0.95),
    "black": (0.06, 0.06, 0.06),
}
COLOURS = tuple(PALETTE)[:6]  # of objects; backgrounds may be any of the palette
BACKGROUNDS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
VEIL = 0.72  # the grey that fading tends to: pale, so that no change of contrast undoes it
RADIUS = ((0.14, 0.20), (0.27, 0.34))  # of the circle of equal area, as a share of the side
REFERENCE_SIDE = 64  # softness is given in pixels at this side

_PROMPT = re.compile(
    rf"an? (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
    rf"(?: on an? (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


def _with_article(description: str) -> str:
    return f"an {description}" if description[0] in "aeiou" else f"a {description}"


@dataclass(frozen=True)
class Scene:
    """The content of a prompt; None if the prompt leaves it open."""

    colour: str
    shape: str
    size: str | None = None
    background: str | None = None

    @property
    def prompt(self) -> str:
        thing = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        text = _with_article(thing)
        return f"{text} on {_with_article(self.background)} background" if self.background else text

    @classmethod
    def parse(cls, prompt: str) -> "Scene":
        """Read a prompt of this world; ValueError if it is none."""
        match = _PROMPT.fullmatch(prompt.strip().lower())
        if match is None:
            raise ValueError(
                f"prompt {prompt!r} is not of the drawn world; it should read like "
                "'a small red cross on a white background' (size and background may be left out)"
            )
        return cls(**match.groupdict())


def all_scenes() -> list[Scene]:
    """Every scene that a prompt can describe: 576, from 'a red cross' to fully described ones."""
    return [
        Scene(colour, shape, size, background)
        for size, colour, shape, background in product((*SIZES, None), COLOURS, SHAPES, (*BACKGROUNDS, None))
        if colour != background
    ]


def draw_attributes(scenes: list[Scene], generator: Generator) -> Tensor:
    """Indices (n, 4) of size, colour, shape and background; open choices are drawn at random."""
    free = torch.rand(len(scenes), 2, generator=generator).tolist()
    rows = []
    for scene, (u_size, u_background) in zip(scenes, free, strict=True):
        colour = COLOURS.index(scene.colour)
        size = SIZES.index(scene.size) if scene.size else int(u_size * len(SIZES))
        if scene.background:
            background = BACKGROUNDS.index(scene.background)
        else:
            others = [i for i in range(len(BACKGROUNDS)) if i != colour]
            background = others[int(u_background * len(others))]
        rows.append((size, colour, SHAPES.index(scene.shape), background))
    return torch.tensor(rows, dtype=torch.long).view(-1, 4)


FADE, SOFTNESS, BLOTCH, OFFSET = (0.0, 0.6), (0.5, 4.5), (0.0, 0.18), 0.18
CARE = ((0.0, 0.35), (0.45, 1.0))  # flaws as shares of their ranges: with care, and without


def draw_quality(n: int, generator: Generator, *, flaw: float = 1.0) -> Tensor:
    """Quality factors (n, 5): fade, softness, blotch, dx, dy, drawn uniformly up to `flaw` times their range."""
    u = flaw * torch.rand(n, 3, generator=generator)
    offset = flaw * OFFSET * (2 * torch.rand(n, 2, generator=generator) - 1)
    low, high = torch.tensor([FADE, SOFTNESS, BLOTCH]).T
    return torch.cat([low + (high - low) * u, offset], dim=1)


def draw_care(n: int, generator: Generator) -> Tensor:
    """Quality factors (n, 5), as of `draw_quality`, of pictures half of which are made with care and half without.

    All flaws of a picture are small, or all are large: each is drawn uniformly from its part of `CARE`.
    """
    careful = torch.rand(n, 1, generator=generator) < 0.5
    (least, most), (careless_least, careless_most) = CARE
    u = torch.rand(n, 4, generator=generator)
    share = torch.where(careful, least + (most - least) * u, careless_least + (careless_most - careless_least) * u)
    angle = 2 * math.pi * torch.rand(n, 1, generator=generator)
    offset = OFFSET * share[:, 3:] * torch.cat([angle.cos(), angle.sin()], dim=1)
    low, high = torch.tensor([FADE, SOFTNESS, BLOTCH]).T
    return torch.cat([low + (high - low) * share[:, :3], offset], dim=1)


def signed_distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to each picture's outline, negative inside.

    shape: (n,) index into SHAPES; x, y: (n, h, w) coordinates; radius: (n,) of the circle of equal area.
    """
    r = radius.view(-1, 1, 1)
    circle = (x * x + y * y).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - r * math.sqrt(math.pi) / 2
    inradius = r * math.sqrt(math.pi / (3 * math.sqrt(3)))
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(y, slope * x.abs() - 0.5 * y) - inradius
    thickness = 0.36  # of a cross's arm, as a share of its length
    arm = r * math.sqrt(math.pi / (4 * (2 * thickness - thickness**2)))
    upright = torch.maximum(x.abs() - thickness * arm, y.abs() - arm)
    across = torch.maximum(x.abs() - arm, y.abs() - thickness * arm)
    cross = torch.minimum(upright, across)
    distances = torch.stack([circle, square, triangle, cross])  # (4, n, h, w)
    return distances[shape, torch.arange(len(shape))]


def pixel_grid(n: int, side: int) -> tuple[Tensor, Tensor]:
    """Coordinates x, y (n, side, side) of the pixels' centres, from -.5 to .5."""
    axis = (torch.arange(side) + 0.5) / side - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x.expand(n, -1, -1), y.expand(n, -1, -1)


def coverage(distance: Tensor, softness: Tensor) -> Tensor:
    """How much of each pixel the object covers: a logistic edge `softness` pixels wide at 64 px."""
    return torch.sigmoid(-distance * REFERENCE_SIDE / (0.6 * softness.view(-1, 1, 1)))


def render(attributes: Tensor, quality: Tensor, generator: Generator, *, side: int = 64) -> Tensor:
    """Pictures (n, 3, side, side) in [0, 1] of attributes (n, 4) with quality factors (n, 5)."""
    n = len(attributes)
    size, colour, shape, background = attributes.T
    fade, softness, blotch, dx, dy = quality.T
    low, high = torch.tensor(RADIUS)[size].T
    radius = low + (high - low) * torch.rand(n, generator=generator)
    x, y = pixel_grid(n, side)
    distance = signed_distance(shape, x - dx.view(n, 1, 1), y - dy.view(n, 1, 1), radius)
    mask = coverage(distance, softness)[:, None]
    palette = torch.tensor(list(PALETTE.values()))
    veiled = palette[None] * (1 - fade.view(n, 1, 1)) + VEIL * fade.view(n, 1, 1)  # (n, colours, 3)
    rows = torch.arange(n)
    inside, outside = (veiled[rows, index][:, :, None, None] for index in (colour, background))
    noise = torch.randn(n, 3, 5, 5, generator=generator)
    noise = 0.35 * noise + 0.65 * noise.mean(dim=1, keepdim=True)
    blotches = F.interpolate(noise, size=(side, side), mode="bicubic", align_corners=True)
    picture = mask * inside + (1 - mask) * outside + 0.6 * blotch.view(n, 1, 1, 1) * blotches
    return picture.clamp(0, 1)
