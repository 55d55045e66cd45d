"""Latents of a policy by our sampler, and of a pipeline by diffusers' own, from the same start."""

import torch
from torch import Tensor

from spo.config import SamplingConfig
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.network import Pipeline
from tests.models.tiny import RESOLUTION, draw_latents, sample_ddim

PROMPTS = ["a red house", "fog"]
SAMPLING = SamplingConfig(steps=2, eta=0.0)
RANK = 2


def ours(denoiser: LatentDiffusion) -> Tensor:
    return sample_ddim(denoiser, draw_latents(denoiser, 2), denoiser.encode(PROMPTS))


def theirs(pipeline: Pipeline) -> Tensor:
    return pipeline(
        PROMPTS,
        latents=torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(pipeline.unet.dtype),
        num_inference_steps=2,
        guidance_scale=5.0,
        height=RESOLUTION,
        width=RESOLUTION,
        output_type="latent",
    ).images


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
