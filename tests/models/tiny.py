"""Pipelines of all families with random tiny weights, made in memory: no network, no downloads."""

import inspect
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from spo.config import ModelConfig, SamplingConfig
from spo.core.types import Conditioning
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build
from spo.models.network import Pipeline

DIFFUSION, FLOWS = ("sd15", "sdxl"), ("sd3", "flux")
FAMILIES = (*DIFFUSION, *FLOWS)
RESOLUTION = 16  # pixels; latents are 8 x 8
TOKENS = 12
T5_TOKENS = 6


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
    family: str,
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    guidance_embeds: bool = True,
    safe_serialization: bool = True,
    seed: int = 0,
) -> Path:
    """Save a random pipeline of the family as diffusers does, and return its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _make_flow(family, guidance_embeds) if family in FLOWS else _make_diffusion(family, prediction_type)
    pipeline.save_pretrained(folder, safe_serialization=safe_serialization)
    return folder


def make_vae(shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        scaling_factor=0.3,
        shift_factor=shift,
    )


def _make_flow(family: str, guidance_embeds: bool) -> Pipeline:
    """SD3.5 medium's layers without T5; FLUX.1-dev's, or schnell's without guidance_embeds, with a dynamic grid."""
    tokenizer = make_tokenizer()
    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
    parts: dict[str, Any] = {"vae": make_vae(shift=0.1), "tokenizer": tokenizer}
    if family == "sd3":
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=72,  # the two CLIPs' 64, padded
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
            **sizes,
        )
        clips = [CLIPTextModelWithProjection(_text_config(tokenizer)) for _ in range(2)]
        return StableDiffusion3Pipeline(
            **parts,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=clips[0],
            text_encoder_2=clips[1],
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    letters = [chr(code) for code in range(33, 127)]
    t5_tokenizer = T5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in letters)])
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
        **sizes,
    )
    return FluxPipeline(
        **parts,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(t5_tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer_2=t5_tokenizer,
    )


def _make_diffusion(family: str, prediction_type: str) -> Pipeline:
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
    vae = make_vae()
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
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = CLIPTextModelWithProjection(_text_config(tokenizer))
    return StableDiffusionXLPipeline(**parts, tokenizer_2=make_tokenizer(), text_encoder_2=second)


def load_plainly(folder: Path) -> Pipeline:
    """What diffusers loads, without any of our code."""
    absent = ("safety_checker", "text_encoder_3", "tokenizer_3")  # what no such folder has
    index = DiffusionPipeline.load_config(folder)
    known = inspect.signature(getattr(diffusers, index["_class_name"])).parameters
    pipeline = DiffusionPipeline.from_pretrained(folder, **{name: None for name in absent if name in known})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_tiny_denoiser(
    family: str, folder: Path, *, sampling: SamplingConfig | None = None, **model: Any
) -> LatentDiffusion:
    """Load such a folder as the stages do; `model` is passed to ModelConfig."""
    model = {**({"t5_tokens": T5_TOKENS} if family in FLOWS else {}), **model}
    config = ModelConfig(family=family, path=str(folder), **{"resolution": RESOLUTION, **model})
    return build(config, sampling or SamplingConfig(steps=5, eta=1.0, guidance_scale=5.0), "cpu")


def shake(denoiser: LatentDiffusion, *, seed: int = 0, scale: float = 0.2) -> None:
    """Set all that trains to random numbers, so that a LoRA changes something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in denoiser.network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def draw_latents(denoiser: LatentDiffusion, n: int, *, seed: int = 0) -> Tensor:
    return torch.randn(n, *denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_plainly(denoiser: LatentDiffusion, x_t: Tensor, cond: Conditioning) -> Tensor:
    """Follow the means of the transitions to x_0: with eta 0, DDIM or Euler."""
    grid = [*denoiser.timesteps.tolist(), 0]
    for now, then in pairwise(grid):
        t, t_prev = torch.full((len(x_t),), now), torch.full((len(x_t),), then)
        x_t = denoiser.transition(denoiser.predict(x_t, t, cond), x_t, t, t_prev).mean
    return x_t


def with_sampling(denoiser: LatentDiffusion, **changes: Any) -> LatentDiffusion:
    """The same network and autoencoder behind another sampler."""
    now = denoiser.sampler
    settings = {"steps": len(now.timesteps), "eta": now.eta, "guidance_scale": now.guidance_scale, **changes}
    return replace(denoiser, sampler=denoiser.network.sampler(SamplingConfig(**settings)))
