"""Diffusion pipelines of both families with random tiny weights, made in memory: no network, no downloads."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from spo.config import ModelConfig, SamplingConfig
from spo.core.types import Conditioning
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build
from spo.models.sampler import Sampler

FAMILIES = ("sd15", "sdxl")
RESOLUTION = 16  # pixels; latents are 8 x 8
TOKENS = 12


def make_tokenizer() -> CLIPTokenizer:
    """Letters only."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=[], model_max_length=TOKENS)


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_tiny_pipeline(
    family: str, folder: Path, *, prediction_type: str = "epsilon", safe_serialization: bool = True, seed: int = 0
) -> Path:
    """Save a random pipeline of the family as diffusers does, and return its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        width = 32 if family == "sd15" else 64
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        }
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=width,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            **(more if family == "sdxl" else {}),
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=RESOLUTION,
            scaling_factor=0.3,
        )
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        )
        parts = {"unet": unet, "vae": vae, "scheduler": scheduler, "tokenizer": tokenizer}
        parts["text_encoder"] = CLIPTextModel(_text_config(tokenizer))
        if family == "sd15":
            pipeline = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        else:
            second = CLIPTextModelWithProjection(_text_config(tokenizer))
            pipeline = StableDiffusionXLPipeline(**parts, tokenizer_2=make_tokenizer(), text_encoder_2=second)
    pipeline.save_pretrained(folder, safe_serialization=safe_serialization)
    return folder


def make_tiny_denoiser(
    family: str, folder: Path, *, sampling: SamplingConfig | None = None, **model: Any
) -> LatentDiffusion:
    """Load such a folder as the stages do; `model` is passed to ModelConfig."""
    config = ModelConfig(family=family, path=str(folder), resolution=RESOLUTION, **model)
    return build(config, sampling or SamplingConfig(steps=5, eta=1.0, guidance_scale=5.0), "cpu")


def shake(denoiser: LatentDiffusion, *, seed: int = 0, scale: float = 0.2) -> None:
    """Set all that trains to random numbers, so that a LoRA changes something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in denoiser.network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def draw_latents(denoiser: LatentDiffusion, n: int, *, seed: int = 0) -> Tensor:
    return torch.randn(n, *denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_ddim(denoiser: LatentDiffusion, x_t: Tensor, cond: Conditioning) -> Tensor:
    """Follow the means of the transitions to x_0: DDIM with eta 0."""
    grid = [*denoiser.timesteps.tolist(), 0]
    for now, then in pairwise(grid):
        t, t_prev = torch.full((len(x_t),), now), torch.full((len(x_t),), then)
        x_t = denoiser.transition(denoiser.predict(x_t, t, cond), x_t, t, t_prev).mean
    return x_t


def with_sampling(denoiser: LatentDiffusion, **changes: Any) -> LatentDiffusion:
    """The same network and autoencoder behind another sampler."""
    now = denoiser.sampler
    settings = {"steps": len(now.timesteps), "eta": now.eta, "guidance_scale": now.guidance_scale, **changes}
    scheduler = denoiser.network.pipeline.scheduler.config
    sampler = Sampler.ddim(scheduler, SamplingConfig(**settings), denoiser.device)
    return replace(denoiser, sampler=sampler)
