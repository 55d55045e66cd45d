from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from spo.errors import ModelError
from spo.preference.latent_space import LatentSpace


def make_vae(seed: int = 0, channels: int = 4, scaling: float = 0.2) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=scaling,
    )


def test_the_same_autoencoder_is_accepted_in_any_precision_and_with_another_decoder():
    space = LatentSpace.of(make_vae())
    assert len(space.probe) == 4 * 4
    space.check(make_vae())
    space.check(make_vae().to(torch.bfloat16))
    other = make_vae()
    for parameter in other.decoder.parameters():
        parameter.data.mul_(2)
    space.check(other)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 1}, "latents of one image differ by"),
        ({"channels": 8}, "8 channels instead of 4"),
        ({"scaling": 0.3}, "0.3 and 0 instead of 0.2 and 0"),
    ],
)
def test_another_autoencoder_is_refused_in_one_line(other: dict, said: str):
    with pytest.raises(ModelError, match=said) as error:
        LatentSpace.of(make_vae()).check(make_vae(**other))
    assert "\n" not in str(error.value)


def test_a_shift_is_part_of_it():
    space = LatentSpace.of(make_vae())
    with pytest.raises(ModelError, match=r"0\.2 and 0 instead of 0\.2 and 0\.1"):
        replace(space, shift_factor=0.1).check(make_vae())
