"""Images of the diffusers pipeline, each with its own seed."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from spo.config import FLOW, SamplerConfig
from spo.core.noise import seed_of
from spo.errors import ModelError
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.schedulers import build_scheduler
from spo.runtime.progress import progress


def image_seed(seed: int, prompt: str, image_index: int) -> int:
    """The seed of a prompt's image; it does not depend on the other images."""
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
    """Images (n, 3, H, W) in [0, 1], on the CPU, of the diffusers pipeline with the LoRA that is on, if any.

    prompts, seeds: n each; an image depends only on its prompt and seed, not on its batch. A label shows progress.
    ModelError for pixels that are not finite.
    """
    pipeline = model.network.pipeline
    _, height, width = model.latent_shape
    starts = range(0, len(prompts), batch_size)
    scheduler, batches = pipeline.scheduler, []
    pipeline.scheduler = build_scheduler(sampler, scheduler.config)
    options = model.network.text_options | ({} if sampler.scheduler == FLOW else {"eta": sampler.eta or 0.0})
    try:
        with model.network.text_encoders_ready():
            for start in starts if label is None else progress(starts, label=label):
                generators = [Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
                pipeline.scheduler.generators = generators  # read by the scheduler of flow models
                images = pipeline(
                    prompt=list(prompts[start : start + batch_size]),
                    height=height * pipeline.vae_scale_factor,
                    width=width * pipeline.vae_scale_factor,
                    num_inference_steps=sampler.steps,
                    guidance_scale=sampler.guidance_scale,
                    generator=generators,
                    output_type="pt",
                    **options,
                ).images
                if not images.isfinite().all():
                    raise ModelError(
                        f"the model paints pixels that are not finite ({sampler.description}; first prompt "
                        f"{prompts[start]!r}); its weights are broken, the guidance is too high, or "
                        f"{model.network.dtype} is too narrow: use other weights, less guidance, or "
                        "model.dtype=bfloat16 or float32"
                    )
                batches.append(images.float().cpu().clamp(0, 1))
    finally:
        pipeline.scheduler = scheduler
    return torch.cat(batches)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded as in a PNG."""
    return (images * 255).round().byte()


def from_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] from uint8."""
    return images.float() / 255


def eight_bits(images: Tensor) -> Tensor:
    """Images in [0, 1] rounded as in a PNG; scores use these, so the saved files give the same scores."""
    return from_bytes(to_bytes(images))
