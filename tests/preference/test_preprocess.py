from typing import get_args

import pytest
import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from spo.preference.preprocess import Mode, Preprocessing

MODES = get_args(Mode)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_the_clips_size_is_only_normalised(images: torch.Tensor, mode: Mode):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    assert torch.equal(Preprocessing(size=24, mode=mode)(images), (images - mean) / std)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(64, 64), (36, 52), (81, 40), (10, 17)])
def test_every_image_comes_out_square_and_within_the_range_of_colours(mode: Mode, shape: tuple[int, int]):
    sharp = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)).round()
    plain = Preprocessing(size=24, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), mode=mode)
    pixels = plain(sharp)
    assert pixels.shape == (2, 3, 24, 24)
    assert pixels.min() >= 0
    assert pixels.max() <= 1


@pytest.mark.parametrize("mode", MODES)
def test_the_crop_is_central(mode: Mode):
    wide = torch.rand(1, 3, 48, 100, generator=torch.Generator().manual_seed(0))
    preprocess = Preprocessing(size=24, mode=mode)
    torch.testing.assert_close(preprocess(wide.flip(-1)), preprocess(wide).flip(-1), rtol=0, atol=1e-5)


def test_antialiasing_averages_what_published_skips():
    noise = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    smooth, sharp = (Preprocessing(size=24, mode=mode)(noise) for mode in ("antialias", "published"))
    assert 2 * smooth.std() < sharp.std()


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 4, 24, 24)])
def test_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"give \(n, 3, H, W\)"):
        Preprocessing(size=24)(torch.zeros(shape))
