"""Tiny latent preference models, from random pipelines of both families."""

from pathlib import Path

import torch
from torch import Tensor

from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.latent_checkpoint import LatentPreference
from tests.models.tiny import make_tiny_denoiser, make_tiny_pipeline

PROMPTS = ["a red house", "fog", "9 cats"]


def make_base(family: str, folder: Path, *, seed: int = 0) -> LatentDiffusion:
    return make_tiny_denoiser(family, make_tiny_pipeline(family, folder, seed=seed))


def make_preference(base: LatentDiffusion, **options) -> LatentPreference:
    """With scores that differ clearly between latents."""
    generator = torch.Generator().manual_seed(1)
    return LatentPreference.from_pipeline(base.network.pipeline, generator=generator, **options)


def latents(n: int, *, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
