"""Images of a plain diffusers pipeline, each from a seed of its own."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from spo.config import SamplerConfig
from spo.core.noise import seed_of
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.schedulers import build_scheduler
from spo.runtime.progress import progress


def image_seed(seed: int, prompt: str, image_index: int) -> int:
    """The seed of a prompt's image: known by what it is for, whatever is generated beside it."""
    return seed_of(f"{seed}/{image_index}/{prompt}".encode())


@torch.no_grad()
def generate(
    model: LatentDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    sampler: SamplerConfig,
    batch_size: int,
    label: str | None = None,
) -> Tensor:
    """Images (n, 3, H, W) in [0, 1], on the CPU, of the diffusers pipeline with whatever LoRA is on.

    prompts, seeds: n each; an image depends on its prompt and seed alone, not on its batch. A label shows progress.
    """
    rows = [row.tolist() for row in torch.arange(len(prompts)).split(batch_size)]
    own = model.network.pipeline.scheduler
    model.network.pipeline.scheduler = build_scheduler(sampler, own.config)
    try:
        batches = [
            _batch(model, [prompts[i] for i in row], [seeds[i] for i in row], sampler)
            for row in (rows if label is None else progress(rows, label=label))
        ]
    finally:
        model.network.pipeline.scheduler = own
    return torch.cat(batches)


def _batch(model: LatentDiffusion, prompts: list[str], seeds: list[int], sampler: SamplerConfig) -> Tensor:
    _, height, width = model.latent_shape
    pipeline = model.network.pipeline
    scale = pipeline.vae_scale_factor
    images = pipeline(
        prompt=prompts,
        height=height * scale,
        width=width * scale,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        eta=sampler.eta or 0.0,
        generator=[Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return images.float().cpu().clamp(0, 1)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as a PNG keeps them, uint8."""
    return (images * 255).round().byte()


def from_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] of uint8."""
    return images.float() / 255


def eight_bits(images: Tensor) -> Tensor:
    """Images in [0, 1] as a PNG keeps them: scores are of these, so that the files give them again."""
    return from_bytes(to_bytes(images))
