"""Latents of a policy by our sampler, and of a pipeline by diffusers' own, from the same start."""

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor

from spo.config import SamplingConfig
from spo.models.flux import pack, unpack
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.network import Pipeline
from tests.models.tiny import RESOLUTION, T5_TOKENS, draw_latents, sample_plainly

PROMPTS = ["a red house", "fog"]
SAMPLING = SamplingConfig(steps=2, eta=0.0)
RANK = 2


def ours(denoiser: LatentDiffusion) -> Tensor:
    return sample_plainly(denoiser, draw_latents(denoiser, 2), denoiser.encode(PROMPTS))


def theirs(
    pipeline: Pipeline,
    *,
    steps: int = 2,
    guidance_scale: float = 5.0,
    height: int = RESOLUTION,
    width: int = RESOLUTION,
) -> Tensor:
    """(2, 4, height / 2, width / 2)"""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, height // 2, width // 2, generator=generator).to(pipeline.vae.dtype)
    is_packed = isinstance(pipeline, FluxPipeline)
    has_t5 = isinstance(pipeline, FluxPipeline | StableDiffusion3Pipeline)
    sampled = pipeline(
        PROMPTS,
        latents=pack(latents, 2) if is_packed else latents,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        output_type="latent",
        **({"max_sequence_length": T5_TOKENS} if has_t5 else {}),
    ).images
    return unpack(sampled, 2, height=height // 2) if is_packed else sampled


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
