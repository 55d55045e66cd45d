"""The published figures' policies, as this project's diffusion models."""

from collections.abc import Mapping
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from spo.config import SamplingConfig
from spo.models.autoencoder import Autoencoder
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.sampler import Sampler
from spo.models.sd15 import StableDiffusionNetwork
from spo.models.sdxl import StableDiffusionXLNetwork
from tests.golden.lpo.conftest import LPO, read

SIDE = 64  # pixels, of latents 8 x 8


def make_policy(unet: str, model: str, scheduler: Mapping[str, Any], *, steps: int) -> LatentDiffusion:
    """The UNet in a folder with SPO's guidance and eta 1; text encoders and tokenizers are those of `model`."""
    preference = read(model)
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    )
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_pretrained(LPO / unet),
        "vae": vae,
        "scheduler": DDIMScheduler.from_config(dict(scheduler)),
        "text_encoder": preference.model.text_encoders[0],
        "tokenizer": preference.tokenizers[0],
    }
    network: StableDiffusionNetwork | StableDiffusionXLNetwork
    if preference.family == "sd15":
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        network = StableDiffusionNetwork(pipeline, resolution=SIDE)
    else:
        parts |= {"text_encoder_2": preference.model.text_encoders[1], "tokenizer_2": preference.tokenizers[1]}
        network = StableDiffusionXLNetwork(StableDiffusionXLPipeline(**parts), resolution=SIDE)
    sampling = SamplingConfig(steps=steps, eta=1.0, guidance_scale=5.0)
    sampler = Sampler.ddim(scheduler, sampling, network.device)
    return LatentDiffusion(network, sampler, Autoencoder(vae, resolution=SIDE))
