"""Whole systems to be timed, by size: the embedded default, and Stable Diffusion's shapes with random weights.

mini    seconds on a CPU: for trying the benchmarks out; mini-sdxl likewise
tiny    the embedded default, as shipped
small   Stable Diffusion v1.5 in small: four levels, 6.2 million parameters, 16 x 16 latents
sd15    Stable Diffusion v1.5 at 512 px with PickScore's CLIP
sdxl    Stable Diffusion XL at 1024 px with the same CLIP
sd35    Stable Diffusion 3.5 medium at 512 px with the same CLIP and without T5. mini-sd35 in small
flux    FLUX.1-dev at 512 px with the same CLIP, and one layer of T5. mini-flux in small

The last four run on a GPU, or with `--device cpu` slowly on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
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
    T5Config,
    T5EncoderModel,
)

from spo.commands.published_models import FLUX, SD35_MEDIUM, SDXL
from spo.config import LoraConfig, OptimizerConfig, SamplingConfig, SpoConfig, load_config
from spo.models.autoencoder import Autoencoder
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import NETWORKS, build, compile_blocks, order_for_convolutions
from spo.models.lora import add_lora
from spo.preference.checkpoint import PreferenceModel, load_clip
from spo.preference.pixel import StepAwareCLIP
from spo.preference.preprocess import Preprocessing

TOKENS = 77
LEVELS = 4


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the names of classes."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


@dataclass(frozen=True)
class Shape:
    """The sizes of a system of random weights; the defaults are Stable Diffusion v1.5's."""

    family: str = "sd15"
    network: dict[str, Any] = field(default_factory=dict)  # the denoising network's configuration
    vae: tuple[int, ...] = (128, 256, 512, 512)
    vae_layers: int = 2
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latent_channels: int = 4
    t5_tokens: int | None = None
    guidance_scale: float = 5.0
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


PROJECTED_TOWER = {**SMALL_TOWER, "projection_dim": 32}
_flow_vae: dict[str, Any] = {"latent_channels": 16}
_small_flow: dict[str, Any] = {
    **_flow_vae,
    "vae": (8, 8, 8, 8),
    "vae_layers": 1,
    **_small_clip(32, 2, 32),
    "text": (SMALL_TOWER,),
    "shift_factor": 0.1,
    "t5_tokens": 16,
    "resolution": 64,
    "steps": 4,
}
SHAPES = {
    "mini": Shape(
        network={
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
        family="sdxl",
        network={
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
        network={"block_out_channels": (32, 64, 96, 112), "cross_attention_dim": 64, "norm_num_groups": 8},
        vae=(8, 16, 32, 32),
        vae_layers=1,
        **_small_clip(96, 4, 112),
        resolution=128,
        settings={"prompts_per_rollout": 10, "batch_size": 10},
    ),
    "sd15": Shape(),
    "sdxl": Shape(
        family="sdxl",
        network=plain(SDXL),
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
    "mini-sd35": Shape(
        family="sd3",
        network={
            **plain(SD35_MEDIUM),
            "num_layers": 2,
            "dual_attention_layers": (0,),
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "caption_projection_dim": 16,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
        },
        **{**_small_flow, "text": (PROJECTED_TOWER, PROJECTED_TOWER)},
        settings={"prompts_per_rollout": 2, "batch_size": 3, "micro_batch_size": 2, "first_step": 1},
    ),
    "mini-flux": Shape(
        family="flux",
        network={
            **plain(FLUX),
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
        },
        **_small_flow,
        settings={"prompts_per_rollout": 2, "batch_size": 2, "micro_batch_size": 2, "first_step": 1},
    ),
    "sd35": Shape(
        family="sd3",
        network=plain(SD35_MEDIUM),
        **_flow_vae,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        text=(
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768},
            {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280},
        ),
        guidance_scale=4.5,
        settings={  # of the profile, with fewer prompts
            "prompts_per_rollout": 4,
            "first_step": 8,
            "batch_size": 4,
            "micro_batch_size": 4,
            "lora": LoraConfig(rank=32),
        },
    ),
    "flux": Shape(
        family="flux",
        network=plain(FLUX),
        **_flow_vae,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        guidance_scale=3.5,
        settings={  # of the profile, with fewer prompts
            "prompts_per_rollout": 2,
            "first_step": 6,
            "batch_size": 2,
            "micro_batch_size": 2,
            "lora": LoraConfig(rank=64),
        },
    ),
}
FULL_SIZE = ("sd15", "sdxl", "sd35", "flux")
DEVICES = ("cpu", "cuda")


def device_of(size: str, named: str | None = None) -> torch.device:
    """The device that is named, else a GPU for a full size and the CPU for others; SystemExit without that GPU."""
    device = torch.device(named or ("cuda" if size in FULL_SIZE else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--size {size} runs on a GPU, and there is none here; add --device cpu, which is slow")
    return device


@dataclass(frozen=True)
class System:
    """A policy with a LoRA that has left its base, a preference model that knows t, and the settings of a batch."""

    size: str
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
    once = {"epochs": 1, "rollouts_per_epoch": 1, "checkpoints": 1, "threshold": 0.0}
    settings = SpoConfig(**{**settings, **once, "look_ahead": 0})  # as the published way
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
    return System(size, policy, preference, settings, prompts_, **({"latent_guidance_scale": 1.0} if config else {}))


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
    with torch.device(device):
        pipeline = PIPELINES[shape.family](shape)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device, dtype)
    order_for_convolutions(pipeline)
    network = NETWORKS[shape.family](pipeline, resolution=shape.resolution, t5_tokens=shape.t5_tokens)
    if shape.family != "sd15":
        network.module.enable_gradient_checkpointing()
    sampler = network.sampler(SamplingConfig(steps=steps or shape.steps, guidance_scale=shape.guidance_scale))
    return LatentDiffusion(network, sampler, Autoencoder(pipeline.vae, resolution=shape.resolution))


def compile_policy(policy: LatentDiffusion) -> None:
    """What model.compile does while a model is loaded, to one that is made already."""
    order_for_convolutions(policy.network.pipeline, compiled=True)
    for module in (policy.network.module, policy.autoencoder.vae):
        compile_blocks(module)


def _sd15(shape: Shape) -> StableDiffusionPipeline:
    parts = {"unet": make_network(shape), "vae": make_vae(shape), "scheduler": _ddim()}
    parts |= {"text_encoder": _text_encoder(shape, 0, CLIPTextModel), "tokenizer": make_tokenizer()}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts)


def _sdxl(shape: Shape) -> StableDiffusionXLPipeline:
    parts = {"unet": make_network(shape), "vae": make_vae(shape), "scheduler": _ddim()}
    parts |= {"text_encoder": _text_encoder(shape, 0, CLIPTextModel), "tokenizer": make_tokenizer()}
    second = _text_encoder(shape, 1, CLIPTextModelWithProjection)
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=make_tokenizer())


def _sd3(shape: Shape) -> StableDiffusion3Pipeline:
    """Without T5, so zeros of the same shape stand in its place."""
    first, second = (_text_encoder(shape, i, CLIPTextModelWithProjection) for i in range(2))
    return StableDiffusion3Pipeline(
        transformer=make_network(shape),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(shape),
        text_encoder=first,
        tokenizer=make_tokenizer(),
        text_encoder_2=second,
        tokenizer_2=make_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _flux(shape: Shape) -> FluxPipeline:
    width = shape.network.get("joint_attention_dim", 4096)
    heads = {"num_heads": width // 64, "d_kv": 64}
    t5 = T5EncoderModel(T5Config(vocab_size=32128, d_model=width, d_ff=5 * width // 2, num_layers=1, **heads))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=make_vae(shape),
        text_encoder=_text_encoder(shape, 0, CLIPTextModel),
        tokenizer=make_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=make_tokenizer(),
        transformer=make_network(shape),
    )


PIPELINES: dict[str, Callable[[Shape], Any]] = {"sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _text_encoder(shape: Shape, number: int, kind: Any) -> Any:
    return kind(CLIPTextConfig(**_tower(shape.text[number], make_tokenizer())))


def make_network(shape: Shape) -> Any:
    """The denoising network of a shape."""
    if shape.family == "sd3":
        return SD3Transformer2DModel(
            **{"in_channels": 16, "out_channels": 16, "attention_head_dim": 64, **shape.network}
        )
    if shape.family == "flux":
        return FluxTransformer2DModel(**shape.network)
    return UNet2DConditionModel(**{"sample_size": shape.resolution // 8, "cross_attention_dim": 768, **shape.network})


def make_vae(shape: Shape) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=shape.vae,
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        layers_per_block=shape.vae_layers,
        norm_num_groups=min(32, shape.vae[0]),
        latent_channels=shape.latent_channels,
        sample_size=shape.resolution,
        scaling_factor=shape.scaling_factor,
        shift_factor=shape.shift_factor,
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
