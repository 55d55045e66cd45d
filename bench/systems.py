"""Whole systems to be timed, by size: the embedded default, and Stable Diffusion's shapes with random weights.

mini    seconds on a CPU: for trying the benchmarks out; mini-sdxl likewise
tiny    the embedded default, as shipped
small   Stable Diffusion v1.5 in small: four levels, 6.2 million parameters, 16 x 16 latents
sd15    Stable Diffusion v1.5 at 512 px with PickScore's CLIP; needs a GPU
sdxl    Stable Diffusion XL at 1024 px with the same CLIP; needs a GPU
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from spo.config import LoraConfig, OptimizerConfig, SamplingConfig, SpoConfig, load_config
from spo.models.autoencoder import Autoencoder
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build
from spo.models.lora import add_lora
from spo.models.sampler import Sampler
from spo.models.sd15 import StableDiffusionNetwork
from spo.models.sdxl import StableDiffusionXLNetwork
from spo.preference.checkpoint import PreferenceModel, load_clip
from spo.preference.pixel import StepAwareCLIP
from spo.preference.preprocess import Preprocessing

TOKENS = 77
LEVELS = 4


@dataclass(frozen=True)
class Shape:
    """The sizes of a system of random weights; the defaults are Stable Diffusion v1.5's."""

    unet: dict[str, Any] = field(default_factory=dict)
    vae: tuple[int, ...] = (128, 256, 512, 512)
    vae_layers: int = 2
    scaling_factor: float = 0.18215
    text: tuple[dict[str, Any], ...] = ({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},)
    clip_text: dict[str, Any] = field(
        default_factory=lambda: {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    )
    clip_vision: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        }
    )
    projection: int = 1024
    resolution: int = 512
    steps: int = 20
    settings: dict[str, Any] = field(default_factory=lambda: {"prompts_per_rollout": 10, "batch_size": 10})


SMALL_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _small_clip(width: int, layers: int, image_size: int) -> dict[str, Any]:
    tower = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    return {
        "text": ({"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},),
        "clip_text": tower,
        "clip_vision": {**tower, "image_size": image_size, "patch_size": 16},
        "projection": 64,
    }


SHAPES = {
    "mini": Shape(
        unet={
            "block_out_channels": (16, 32, 32, 32),
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "norm_num_groups": 8,
        },
        vae=(8, 8, 8, 8),
        vae_layers=1,
        **_small_clip(32, 2, 32),
        resolution=64,
        steps=4,
        settings={"prompts_per_rollout": 2, "batch_size": 3, "first_step": 1},
    ),
    "mini-sdxl": Shape(
        unet={
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": (2, 4, 4),
            "cross_attention_dim": 64,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
            "norm_num_groups": 8,
        },
        vae=(8, 8, 8, 8),
        vae_layers=1,
        **{**_small_clip(32, 2, 32), "text": (SMALL_TOWER, {**SMALL_TOWER, "projection_dim": 32})},
        resolution=64,
        steps=8,
        settings={
            "prompts_per_rollout": 2,
            "candidates": 2,
            "branch_steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
        },
    ),
    "small": Shape(
        unet={"block_out_channels": (32, 64, 96, 112), "cross_attention_dim": 64, "norm_num_groups": 8},
        vae=(8, 16, 32, 32),
        vae_layers=1,
        **_small_clip(96, 4, 112),
        resolution=128,
        settings={"prompts_per_rollout": 10, "batch_size": 10},
    ),
    "sd15": Shape(),
    "sdxl": Shape(
        unet={
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        scaling_factor=0.13025,
        text=(
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
            {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280},
        ),
        resolution=1024,
        settings={
            "prompts_per_rollout": 4,
            "candidates": 2,
            "branch_steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "lora": LoraConfig(rank=64),
            "optimizer": OptimizerConfig(learning_rate=1e-5),
        },
    ),
}
FULL_SIZE = ("sd15", "sdxl")


@dataclass(frozen=True)
class System:
    """A policy with a LoRA that has left its base, a preference model that knows t, and the settings of a batch."""

    policy: LatentDiffusion
    preference: PreferenceModel
    settings: SpoConfig
    prompts: list[str]
    latent_guidance_scale: float = 7.5  # of a latent preference model: LPO's


def make_system(
    size: str,
    device: torch.device | str,
    *,
    prompts: int | None = None,
    steps: int | None = None,
    micro_batch_size: int | None = None,
) -> System:
    """The system of a size with one batch of `prompts`; float32 on the CPU, bfloat16 on a GPU."""
    config = load_config(profile="tiny") if size == "tiny" else None
    settings = config.align["spo"].model_dump() if config else SHAPES[size].settings
    settings = SpoConfig(**{**settings, "epochs": 1, "rollouts_per_epoch": 1, "checkpoints": 1, "threshold": 0.0})
    changes = {"prompts_per_rollout": prompts, "micro_batch_size": micro_batch_size}
    settings = settings.model_copy(update={name: value for name, value in changes.items() if value is not None})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if config:
            sampling = config.sampling.model_copy(update={"steps": steps or config.sampling.steps})
            policy, preference = build(config.model, sampling, device), load_clip("data/base/tiny-preference")
        else:
            policy = make_policy(SHAPES[size], device, steps=steps)
            preference = make_preference(SHAPES[size], device)
        leave_start(preference.model, "modulation")
    prompts_ = [f"a picture of number {i}" for i in range(settings.prompts_per_rollout)]
    return System(policy, preference, settings, prompts_, **({"latent_guidance_scale": 1.0} if config else {}))


def attach_lora(system: System) -> None:
    """Add the LoRA and move it off its start, where it would change nothing."""
    network = system.policy.network
    add_lora(network.module, system.settings.lora, seed=0)
    leave_start(network.module, "lora_B")


def leave_start(module: torch.nn.Module, name: str) -> None:
    """Add noise to the parameters whose name contains `name`."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    for parameter_name, parameter in module.named_parameters():
        if name in parameter_name:
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            parameter.data += 0.02 * noise.to(parameter.dtype)


def make_policy(shape: Shape, device: torch.device | str, *, steps: int | None = None) -> LatentDiffusion:
    """A pipeline of random weights behind the adapter of its family."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    tokenizer = make_tokenizer()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    with torch.device(device):
        parts: dict[str, Any] = {"unet": make_unet(shape), "vae": make_vae(shape), "scheduler": scheduler}
        texts = [CLIPTextConfig(**_tower(text, tokenizer)) for text in shape.text]
        parts |= {"text_encoder": CLIPTextModel(texts[0]), "tokenizer": tokenizer}
        if len(texts) == 1:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = StableDiffusionPipeline(**parts)
        else:
            second = CLIPTextModelWithProjection(texts[1])
            pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=make_tokenizer())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device, dtype)
    for convolutional in (pipeline.unet, pipeline.vae):
        convolutional.to(memory_format=torch.channels_last)  # as spo.models.load does
    family = StableDiffusionNetwork if len(texts) == 1 else StableDiffusionXLNetwork
    if family is StableDiffusionXLNetwork:
        pipeline.unet.enable_gradient_checkpointing()
    network = family(pipeline, resolution=shape.resolution)
    sampler = Sampler.ddim(scheduler.config, SamplingConfig(steps=steps or shape.steps), network.device)
    return LatentDiffusion(network, sampler, Autoencoder(pipeline.vae, resolution=shape.resolution))


def make_unet(shape: Shape) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{"sample_size": shape.resolution // 8, "cross_attention_dim": 768, **shape.unet})


def make_vae(shape: Shape) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=shape.vae,
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        layers_per_block=shape.vae_layers,
        norm_num_groups=min(32, shape.vae[0]),
        latent_channels=4,
        sample_size=shape.resolution,
        scaling_factor=shape.scaling_factor,
    )


def make_preference(shape: Shape, device: torch.device | str) -> PreferenceModel:
    """A step-aware CLIP of random weights, float32."""
    with torch.device(device):
        model = make_clip(shape)
    return PreferenceModel(model, make_tokenizer(), Preprocessing(shape.clip_vision["image_size"]))


def make_clip(shape: Shape) -> StepAwareCLIP:
    vision = {**shape.clip_vision, "intermediate_size": 4 * shape.clip_vision["hidden_size"]}
    text = _tower(shape.clip_text, make_tokenizer())
    return StepAwareCLIP(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.projection)))


def make_tokenizer() -> CLIPTokenizer:
    """Letters only."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=TOKENS)


def _tower(text: dict[str, Any], tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "max_position_embeddings": TOKENS,
        "intermediate_size": 4 * text["hidden_size"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **text,
    }
