"""The drawn world: prompts, and pictures that show what they ask for."""

import pytest
import torch
from torch import Generator

from spo.world.scenes import (
    COLOURS,
    PALETTE,
    SHAPES,
    VEIL,
    Scene,
    all_scenes,
    coverage,
    draw_attributes,
    draw_care,
    draw_quality,
    pixel_grid,
    render,
    signed_distance,
)

PERFECT = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0]])  # fade, softness, blotch, dx, dy


def draw(prompt: str, quality: torch.Tensor = PERFECT, seed: int = 0) -> torch.Tensor:
    generator = Generator().manual_seed(seed)
    return render(draw_attributes([Scene.parse(prompt)], generator), quality, generator)[0]


def test_every_scene_has_a_prompt_of_its_own_that_reads_back():
    scenes = all_scenes()
    assert len({scene.prompt for scene in scenes}) == len(scenes) == 576
    assert all(Scene.parse(scene.prompt) == scene for scene in scenes)


@pytest.mark.parametrize("prompt", ["", "a cat", "a red", "a red circle on a pink background", "a red circle."])
def test_other_prompts_are_refused_with_an_example(prompt):
    with pytest.raises(ValueError, match="small red cross on a white background"):
        Scene.parse(prompt)


def test_articles_fit_the_word_that_follows():
    assert Scene("orange", "circle", background="orange").prompt == "an orange circle on an orange background"
    assert Scene("orange", "cross", "small").prompt == "a small orange cross"


def test_a_perfect_picture_has_the_object_in_the_middle_on_its_background():
    picture = draw("a large red square on a blue background")
    torch.testing.assert_close(picture[:, 32, 32], torch.tensor(PALETTE["red"]), atol=1e-3, rtol=0)
    torch.testing.assert_close(picture[:, 2, 2], torch.tensor(PALETTE["blue"]), atol=1e-3, rtol=0)


def test_what_a_prompt_leaves_open_is_drawn_at_random_but_never_hides_the_object():
    generator = Generator().manual_seed(0)
    attributes = draw_attributes([Scene("red", "circle")] * 400, generator)
    size, colour, _, background = attributes.T
    assert set(size.tolist()) == {0, 1}
    assert (colour == COLOURS.index("red")).all()
    assert len(set(background.tolist())) == len(PALETTE) - 1
    assert (background != colour).all()


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_all_shapes_of_one_radius_have_the_area_of_its_circle(index):
    x, y = pixel_grid(1, 512)
    radius = torch.tensor([0.25])
    area = (signed_distance(torch.tensor([index]), x, y, radius) < 0).float().mean()
    assert area == pytest.approx(torch.pi * 0.25**2, rel=0.01)


def test_fading_mixes_in_the_veil():
    faded = draw("a large red square on a blue background", torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]]))
    expected = 0.5 * torch.tensor(PALETTE["red"]) + 0.5 * VEIL
    torch.testing.assert_close(faded[:, 32, 32], expected, atol=1e-3, rtol=0)


def test_softness_is_the_width_of_the_edge():
    distance = torch.linspace(-0.1, 0.1, 401).view(1, 1, -1)
    for softness in (1.0, 3.0):
        mask = coverage(distance, torch.tensor([softness]))
        slope = (mask.diff(dim=-1) / (0.2 / 400 * 64)).abs().max()  # a pixel at 64 px
        assert slope == pytest.approx(1 / (4 * 0.6 * softness), rel=0.01)


def test_quality_stays_in_its_ranges_and_a_smaller_flaw_in_smaller_ones():
    generator = Generator().manual_seed(0)
    whole, small = draw_quality(2000, generator), draw_quality(2000, generator, flaw=0.1)
    assert (whole.amin(dim=0) >= torch.tensor([0, 0.5, 0, -0.18, -0.18])).all()
    assert (whole.amax(dim=0) <= torch.tensor([0.6, 4.5, 0.18, 0.18, 0.18])).all()
    assert (small.amax(dim=0) <= torch.tensor([0.06, 0.9, 0.018, 0.018, 0.018]) + 1e-6).all()


def test_flaws_of_a_picture_are_all_small_or_all_large():
    quality = draw_care(4000, Generator().manual_seed(0))
    low, high = torch.tensor([0, 0.5, 0]), torch.tensor([0.6, 4.5, 0.18])
    shares = torch.cat([(quality[:, :3] - low) / (high - low), quality[:, 3:].norm(dim=1, keepdim=True) / 0.18], dim=1)
    careful, careless = (shares < 0.3501).all(dim=1), ((shares > 0.4499) & (shares < 1.0001)).all(dim=1)
    assert (careful | careless).all()
    assert 0.45 < careful.float().mean() < 0.55
    for part, middle in ((careful, 0.175), (careless, 0.725)):
        torch.testing.assert_close(shares[part].mean(dim=0), torch.full((4,), middle), atol=0.02, rtol=0)
    assert quality[:, 3:].mean(dim=0).abs().max() < 0.01


def test_the_same_generator_draws_the_same_picture():
    quality = torch.tensor([[0.3, 2.0, 0.1, 0.1, 0.0]])
    assert torch.equal(draw("a red cross", quality), draw("a red cross", quality))
    assert not torch.equal(draw("a red cross", quality), draw("a red cross", quality, seed=1))
