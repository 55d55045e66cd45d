import pytest
import torch

from spo.evaluation.image_scorer import contrast
from tests.world.tricks import blur, gamma, saturation, sharpen

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_control_of_no_strength_changes_nothing() -> None:
    for same in (contrast(IMAGES, 1.0), saturation(IMAGES, 1.0), gamma(IMAGES, 1.0), sharpen(IMAGES, 0.0)):
        torch.testing.assert_close(same, IMAGES)


def test_contrast_keeps_mid_grey_and_moves_the_rest_away() -> None:
    images = torch.tensor([0.5, 0.6, 0.2, 0.9]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    expected = torch.tensor([0.5, 0.7, 0.0, 1.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    torch.testing.assert_close(contrast(images, 2.0), expected)


def test_saturation_zero_leaves_grey_and_grey_has_none() -> None:
    grey = saturation(IMAGES, 0.0)
    torch.testing.assert_close(grey[:, :1].expand_as(grey), grey)
    torch.testing.assert_close(saturation(grey, 3.0), grey)


def test_blur_and_sharpen_keep_a_flat_image() -> None:
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(blur(flat, 1.2), flat)
    torch.testing.assert_close(sharpen(flat, 2.0), flat)


def test_blur_smooths_and_sharpen_roughens() -> None:
    roughness = [x.diff(dim=-1).abs().mean() for x in (blur(IMAGES, 0.8), IMAGES, sharpen(IMAGES, 0.5))]
    assert roughness[0] < roughness[1] < roughness[2]


def test_wrong_strengths_are_named() -> None:
    with pytest.raises(ValueError, match="std=0"):
        blur(IMAGES, 0)
