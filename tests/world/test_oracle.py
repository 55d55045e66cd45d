"""The oracle judges what was drawn: checked against the factors that pictures were drawn with."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor

from spo.evaluation.image_scorer import contrast
from spo.world.oracle import FACTORS, PARTS, oracle_scores
from spo.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    PALETTE,
    RADIUS,
    SHAPES,
    SIZES,
    Scene,
    all_scenes,
    draw_attributes,
    draw_quality,
    render,
)
from spo.world.shape_fitting import trace
from tests.world.tricks import blur, gamma, saturation, sharpen

VAE = Path(__file__).parents[2] / "data" / "base" / "tiny" / "vae"
KINDS = ("renders", "reconstructions")
CHEATS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "contrast": [lambda x, k=k: contrast(x, k) for k in (1.25, 1.6)],
    "saturation": [lambda x, k=k: saturation(x, k) for k in (1.25, 1.6)],
    "sharpening": [lambda x, s=s: sharpen(x, 0.6, std=s) for s in (1.0, 2.0)],
    "blur": [lambda x: blur(x, 0.6)],
    "gamma": [lambda x, k=k: gamma(x, k) for k in (0.85, 1.2)],
}


def draw(n: int, *, flaw: float, seed: int = 11, side: int = 64) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Attributes, quality factors, pictures and full prompts of random scenes."""
    generator = torch.Generator().manual_seed(seed)
    scenes = all_scenes()
    chosen = [scenes[i] for i in torch.randint(len(scenes), (n,), generator=generator).tolist()]
    attributes = draw_attributes(chosen, generator)
    quality = draw_quality(n, generator, flaw=flaw)
    return attributes, quality, render(attributes, quality, generator, side=side), prompts_of(attributes)


def prompts_of(attributes: Tensor) -> list[str]:
    return [
        Scene(COLOURS[colour], SHAPES[shape], SIZES[size], BACKGROUNDS[background]).prompt
        for size, colour, shape, background in attributes.tolist()
    ]


def judge_all(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    rows = [oracle_scores(images[i : i + 128], prompts[i : i + 128]) for i in range(0, len(images), 128)]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@cache
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(VAE).eval()


@torch.no_grad()
def reconstruct(images: Tensor) -> Tensor:
    batches = (autoencoder().decode(autoencoder().encode(2 * x - 1).latent_dist.mean).sample for x in images.split(64))
    return torch.cat([(x / 2 + 0.5).clamp(0, 1) for x in batches])


@cache
def gallery(kind: str, n: int, flaw: float) -> tuple[Tensor, Tensor, Tensor, list[str], dict[str, Tensor]]:
    attributes, quality, images, prompts = draw(n, flaw=flaw)
    if kind == "reconstructions":
        images = reconstruct(images)
    return attributes, quality, images, prompts, judge_all(images, prompts)


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.parametrize("kind", KINDS)
def test_each_factor_follows_its_flaw(kind: str) -> None:
    _, quality, _, _, scores = gallery(kind, 1024, 1.0)
    fade, softness, blotch, dx, dy = quality.T
    flaws = {"vivid": fade, "crisp": softness, "clean": blotch, "centred": torch.hypot(dx, dy)}
    found = {name: round(spearman(scores[name], -flaw), 3) for name, flaw in flaws.items()}
    assert min(found.values()) >= 0.9, found


def test_factors_are_linear_in_their_flaws() -> None:
    _, quality, _, _, scores = gallery("renders", 1024, 1.0)
    fade, softness, blotch, dx, dy = quality.T
    truth = {
        "vivid": 1 - fade / 0.6,
        "crisp": 1 - (softness - 0.5) / 4,
        "clean": 1 - blotch / 0.18,
        "centred": 1 - torch.hypot(dx, dy) / (0.18 * 2**0.5),
    }
    for name in FACTORS:
        assert (scores[name] - truth[name]).abs().mean() < 0.05, name


def test_flawless_pictures_score_one() -> None:
    _, _, _, _, scores = gallery("renders", 128, 0.0)
    for name in (*FACTORS, "aesthetic", "alignment"):
        assert scores[name].mean() >= 0.95, name
    assert scores["correct"].mean() >= 0.99


def test_every_score_lies_between_zero_and_one() -> None:
    for flaw, n in ((0.0, 128), (1.0, 1024)):
        for name, values in gallery("renders", n, flaw)[-1].items():
            assert values.isfinite().all() and values.min() >= 0 and values.max() <= 1, name


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_well_drawn_picture_cannot_be_improved(cheat: str) -> None:
    _, _, images, prompts, scores = gallery("renders", 128, 0.0)
    for trick in CHEATS[cheat]:
        changed = oracle_scores(trick(images), prompts)["aesthetic"]
        assert changed.mean() < scores["aesthetic"].mean() - 0.005
        assert (changed <= scores["aesthetic"] + 0.01).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cheat", CHEATS)
def test_a_trick_buys_a_mediocre_picture_little(kind: str, cheat: str) -> None:
    _, _, images, prompts, scores = gallery(kind, 128, 1.0)
    before = scores["aesthetic"].mean()
    honest = gallery(kind, 128, 0.5)[-1]["aesthetic"].mean() - before  # the same scenes with half their flaws
    assert honest > 0.2
    gains = [(oracle_scores(trick(images), prompts)["aesthetic"].mean() - before).item() for trick in CHEATS[cheat]]
    assert max(gains) < 0.3 * honest


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_drawn_is_found_correct_whatever_the_finish(kind: str) -> None:
    _, quality, _, _, scores = gallery(kind, 1024, 1.0)
    assert scores["correct"].mean() >= 0.95
    for flaw in quality.T[:3]:  # fade, softness, blotch: alignment is nearly the same for the worst third
        worst = flaw > flaw.quantile(2 / 3)
        assert scores["alignment"][worst].mean() > scores["alignment"][~worst].mean() - 0.03


@pytest.mark.parametrize(("part", "column"), [("size", 0), ("colour", 1), ("shape", 2), ("background", 3)])
def test_a_prompt_with_one_attribute_changed_is_not_met(part: str, column: int) -> None:
    attributes, _, images, _, right = gallery("renders", 128, 1.0)
    choices = (len(SIZES), len(COLOURS), len(SHAPES), len(BACKGROUNDS))[column]
    wrong = attributes.clone()
    shift = torch.randint(1, choices, (len(wrong),), generator=torch.Generator().manual_seed(0))
    wrong[:, column] = (wrong[:, column] + shift) % choices
    scores = oracle_scores(images, prompts_of(wrong))
    assert scores[part].mean() < 0.02
    assert scores["correct"].max() == 0
    assert scores["alignment"].mean() < right["alignment"].mean() - 0.2
    others = [name for name in PARTS if name != part]
    assert all(torch.equal(scores[name], right[name]) for name in others)
    assert torch.equal(scores["aesthetic"], right["aesthetic"])


def test_an_attribute_left_open_does_not_count() -> None:
    attributes, _, images, _, full = gallery("renders", 128, 1.0)
    short = [Scene(COLOURS[colour], SHAPES[shape]).prompt for _, colour, shape, _ in attributes.tolist()]
    scores = oracle_scores(images, short)
    assert (scores["size"] == 1).all() and (scores["background"] == 1).all()
    visible = full["alignment"] / torch.stack([full[part] for part in PARTS]).mean(dim=0)
    torch.testing.assert_close(scores["alignment"], (full["shape"] + full["colour"]) / 2 * visible)


def flat(n: int) -> Tensor:
    colours = torch.cat([torch.tensor(list(PALETTE.values())), torch.rand(n - 8, 3, generator=fixed())])
    return colours[:, :, None, None].expand(-1, -1, 64, 64)


def fixed() -> Generator:
    return torch.Generator().manual_seed(5)


def checkerboard(n: int) -> Tensor:
    board = (torch.arange(64)[:, None] // 8 + torch.arange(64) // 8) % 2
    colours = torch.rand(n, 2, 3, 1, 1, generator=fixed())
    return torch.where(board == 1, colours[:, 0], colours[:, 1])


def blotches_only(n: int) -> Tensor:
    attributes, quality, _, _ = draw(n, flaw=1.0)
    quality[:, 3] = 5.0  # the object far outside
    return render(attributes, quality, fixed())


@pytest.mark.parametrize(
    "empty",
    [
        flat,
        lambda n: (flat(n) + 0.03 * torch.randn(n, 3, 64, 64, generator=fixed())).clamp(0, 1),
        lambda n: torch.rand(n, 3, 64, 64, generator=fixed()),
        lambda n: torch.rand(n, 3, 8, 8, generator=fixed()).repeat_interleave(8, 2).repeat_interleave(8, 3),
        lambda n: torch.full((n, 3, 64, 64), torch.nan),
        checkerboard,
        blotches_only,
    ],
    ids=["flat", "grain", "noise", "coarse noise", "not a number", "checkerboard", "blotches"],
)
def test_a_picture_of_nothing_scores_nothing(empty: Callable[[int], Tensor]) -> None:
    _, _, _, prompts = draw(64, flaw=0.0)
    scores = oracle_scores(empty(64), prompts)
    assert scores["aesthetic"].mean() < 0.05
    assert scores["alignment"].mean() < 0.05
    assert scores["correct"].mean() < 0.05


def test_half_an_object_is_not_the_object() -> None:
    _, _, images, prompts, whole = gallery("renders", 128, 0.0)
    halves = images.clone()
    halves[:, :, :, 32:] = images[:, :, :1, :1]  # the background's colour
    scores = oracle_scores(halves, prompts)
    assert scores["shape"].mean() < 0.3
    assert scores["correct"].mean() < 0.3
    assert scores["aesthetic"].mean() < 0.75 * whole["aesthetic"].mean()


def test_noise_over_a_good_picture_costs_cleanness() -> None:
    _, _, images, prompts, scores = gallery("renders", 128, 0.0)
    noisy = (images + 0.08 * torch.randn(images.shape, generator=fixed())).clamp(0, 1)
    assert oracle_scores(noisy, prompts)["clean"].mean() < scores["clean"].mean() - 0.3


@pytest.mark.parametrize("side", [48, 96])
def test_other_sides_are_judged_alike(side: int) -> None:
    _, quality, images, prompts = draw(64, flaw=1.0, side=side)
    scores = oracle_scores(images, prompts)
    assert scores["correct"].mean() >= 0.95
    assert spearman(scores["crisp"], -quality[:, 1]) > 0.95


def test_a_judgement_does_not_depend_on_its_batch() -> None:
    _, _, images, prompts, scores = gallery("renders", 128, 1.0)
    alone = oracle_scores(images[5:8], prompts[5:8])
    for name, values in alone.items():
        torch.testing.assert_close(values, scores[name][5:8], atol=1e-3, rtol=0)


def test_the_fit_finds_the_drawing() -> None:
    attributes, quality, images, _, _ = gallery("renders", 128, 1.0)
    drawing = trace(images)
    assert torch.equal(drawing.shape, attributes[:, 2])
    assert (drawing.x - quality[:, 3]).abs().max() < 0.02
    assert (drawing.y - quality[:, 4]).abs().max() < 0.02
    assert (drawing.softness - quality[:, 1]).abs().median() < 0.02
    border = (RADIUS[0][1] + RADIUS[1][0]) / 2
    assert torch.equal((drawing.radius > border).long(), attributes[:, 0])


@pytest.mark.parametrize(
    ("images", "prompts", "words"),
    [
        (torch.zeros(2, 3, 64, 64), ["a red cross"], "2 images for 1 prompts"),
        (torch.zeros(1, 1, 64, 64), ["a red cross"], "3, side, side"),
        (torch.zeros(1, 3, 64, 32), ["a red cross"], "3, side, side"),
        (torch.zeros(1, 3, 64, 64), ["a photo of a cat"], "not of the drawn world"),
    ],
)
def test_wrong_arguments_are_named(images: Tensor, prompts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        oracle_scores(images, prompts)
