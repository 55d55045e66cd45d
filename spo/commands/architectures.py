"""How large a model is, from its configuration alone: networks without weights, on torch's meta device.

A part's configuration comes from the model's folder or the hub's cache; where it is not at hand, the part is taken to
be that of the published model of its family.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from spo.commands.disk_estimate import size_of
from spo.commands.published_models import CLIP_H, PUBLISHED, SD35_LARGE
from spo.config import (
    LatentPreferenceConfig,
    LoraConfig,
    ModelConfig,
    PixelPreferenceConfig,
    TrainPreferenceConfig,
)
from spo.preference.latent_transformer import LAYERS
from spo.preference.pixel import StepAwareCLIP
from spo.runtime.files import read_json
from spo.runtime.hub import is_name

TOKENS = 77  # of a CLIP's prompt
T5_TOKENS = {"sd3": 256, "flux": 512}  # the pipelines' own
CHECKPOINTED = (  # what gradient checkpointing computes again, one at a time
    *("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock"),
    *("FluxTransformerBlock", "FluxSingleTransformerBlock", "CLIPEncoderLayer"),
)
NETWORKS = {"sd15": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
UP_PATH = ("up_blocks.", "conv_norm_out.", "conv_out.", "conv_act")  # of a UNet


@dataclass(frozen=True)
class Outputs:
    """The numbers that a network's modules put out for one sample."""

    of: Mapping[str, int]  # by the name of each module without children
    blocks: Mapping[str, int]  # by the name of each block that gradient checkpointing computes again
    largest: int  # of one call
    products: Mapping[str, int]  # multiplications, likewise by module; those of attention itself are left out

    def kept(self, *, checkpointing: bool, leave_out: tuple[str, ...] = ()) -> int:
        """The numbers that a forward with gradients keeps: every output, or the blocks' and the largest block's inside.

        leave_out: starts of names of modules that do not run.
        """
        of = {name: count for name, count in self.of.items() if not name.startswith(leave_out)}
        if not checkpointing:
            return sum(of.values())
        blocks = {name: count for name, count in self.blocks.items() if not f"{name}.".startswith(leave_out)}
        inside = dict.fromkeys(blocks, 0)
        for name, count in of.items():
            for block in blocks:
                if name.startswith(f"{block}."):
                    inside[block] += count
        return sum(of.values()) - sum(inside.values()) + sum(blocks.values()) + max(inside.values(), default=0)


def config_of(source: str, part: str = "", file: str = "config.json") -> dict[str, Any] | None:
    """A JSON file of a model's folder or of the hub's cache; None if it is at hand in neither, or broken."""
    from huggingface_hub import try_to_load_from_cache

    name = f"{part}/{file}" if part else file
    path = Path(source) / name
    if not path.is_file() and is_name(source):
        cached = try_to_load_from_cache(source, name)
        path = Path(cached) if isinstance(cached, str) else path
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def part_of(model: ModelConfig, part: str) -> nn.Module:
    """A part of the pipeline on the meta device; an empty one if the pipeline has none."""
    source = model.config or model.path if model.is_single_file else model.path
    if part == "vae" and model.vae:
        values = config_of(model.vae)
    elif part == "text_encoder_3" and not model.t5:
        return nn.Module()
    else:
        values = config_of(source, part)
    if values is None and part not in PUBLISHED[model.family]:
        return nn.Module()
    return _built(json.dumps(values or _published(model, part)), json.dumps(_published(model, part)))


def network_of(model: ModelConfig) -> Any:
    """The denoising network on the meta device."""
    return part_of(model, NETWORKS[model.family])


def text_encoders_of(model: ModelConfig) -> list[nn.Module]:
    """The text encoders on the meta device."""
    parts = [part_of(model, name) for name in TEXT_ENCODERS]
    return [part for part in parts if weights(part)]


def _published(model: ModelConfig, part: str) -> dict[str, Any]:
    if part == "transformer" and model.family == "sd3" and "large" in model.path.lower():
        return SD35_LARGE
    return PUBLISHED[model.family].get(part, {})


@cache
def _built(values: str, otherwise: str) -> nn.Module:
    """The module of a configuration (JSON) on the meta device; that of `otherwise` if it is no such configuration."""
    try:
        return _build(json.loads(values))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        return _build(json.loads(otherwise))


def _build(values: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        if "_class_name" in values:
            kind = getattr(diffusers, values["_class_name"])
            return kind.from_config({name: value for name, value in values.items() if not name.startswith("_")})
        kind = getattr(transformers, values["architectures"][0])
        return kind(kind.config_class.from_dict(values))


def clip_of(source: str | None) -> CLIPModel:
    """A CLIP repository's model on the meta device; None, or one that is not at hand: CLIP-H."""
    values = config_of(source) if source else None
    return _clip(json.dumps(values if values and "vision_config" in values else CLIP_H))


def step_aware(source: str | None) -> StepAwareCLIP:
    """The preference model that starts from a CLIP repository, with its adaptive norms, on the meta device."""
    return _step_aware(clip_of(source))


@cache
def _step_aware(clip: CLIPModel) -> StepAwareCLIP:
    with torch.device("meta"):
        return StepAwareCLIP(clip)


@cache
def _clip(values: str) -> CLIPModel:
    with torch.device("meta"):
        try:
            return CLIPModel(CLIPConfig.from_dict(json.loads(values)))
        except (KeyError, TypeError, ValueError, RuntimeError):
            return CLIPModel(CLIPConfig.from_dict(CLIP_H))


@cache
def weights(*modules: nn.Module, leave_out: tuple[str, ...] = ()) -> int:
    """The number of weights of modules that do not change, without those whose names start with one of `leave_out`."""
    named = [(name, weight) for module in modules for name, weight in module.named_parameters()]
    return sum(weight.numel() for name, weight in named if not name.startswith(leave_out))


def lora_weights(network: nn.Module, lora: LoraConfig) -> int:
    """The number of weights of a LoRA on the network: rank * (inputs + outputs) of each layer that it changes."""
    ends, total = tuple(f".{target}" for target in lora.targets), 0
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and f".{name}".endswith(ends):
            total += lora.rank * (layer.weight[0].numel() + len(layer.weight))
    return total


def preference_weights(model: ModelConfig, training: TrainPreferenceConfig) -> int:
    """The number of weights of a preference model; 0 for one of the user's own class."""
    if training.checkpoint and Path(training.checkpoint).is_dir():
        return size_of(Path(training.checkpoint)) // 4
    if isinstance(training, PixelPreferenceConfig):
        return weights(step_aware(training.start_from))
    if not isinstance(training, LatentPreferenceConfig):
        return 0
    network = network_of(model)
    half = weights(network, leave_out=not_in_latent(model, training))
    if model.is_flow:
        pooled = network.config.pooled_projection_dim
        return half + (network.inner_dim + pooled) * (training.projection_size or pooled) + 1
    encoders: list[Any] = text_encoders_of(model)
    size = training.projection_size or encoders[-1].config.projection_dim
    channels = network.config.block_out_channels
    compared = sum(channels) + channels[-1] + (encoders[0].config.hidden_size if len(encoders) == 1 else 0)
    return half + weights(*encoders) + compared * size + 1


def not_in_latent(model: ModelConfig, training: LatentPreferenceConfig) -> tuple[str, ...]:
    """Starts of the names of the network's modules that a latent preference model leaves out."""
    if not model.is_flow:
        return UP_PATH
    total = len(network_of(model).transformer_blocks)
    count = training.layers or max(1, round(LAYERS * total))
    return ("single_transformer_blocks.", *(f"transformer_blocks.{i}." for i in range(count, total)))


def num_tokens(model: ModelConfig) -> int:
    """Tokens of a prompt that the network attends to."""
    t5 = model.t5_tokens or T5_TOKENS.get(model.family, 0)
    return t5 if model.family == "flux" else TOKENS + t5


def latent_size(model: ModelConfig) -> tuple[int, int, int]:
    """c, h, w of the model's latents."""
    vae: Any = part_of(model, "vae")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = model.size
    return vae.config.latent_channels, height // factor, width // factor


def outputs_of_network(model: ModelConfig) -> Outputs:
    """Of the denoising network, for one sample of the model's size."""
    network = network_of(model)
    return _outputs_of_network(network, model.family, latent_size(model), num_tokens(model))


@cache
def _outputs_of_network(network: Any, family: str, size: tuple[int, int, int], tokens: int) -> Outputs:
    with torch.device("meta"):
        inputs = network_inputs(network, family, torch.empty(1, *size), tokens)
    return _outputs(network, lambda: network(**inputs))


def network_inputs(network: Any, family: str, latents: Tensor, tokens: int) -> dict[str, Any]:
    """What a denoising network takes for latents (1, c, h, w) and a prompt of `tokens`."""
    config = network.config
    if family == "flux":
        patches = latents.shape[-2] * latents.shape[-1] // 4
        return {
            "hidden_states": torch.empty(1, patches, config.in_channels),
            "timestep": torch.ones(1),
            "guidance": torch.ones(1) if config.guidance_embeds else None,
            "encoder_hidden_states": torch.empty(1, tokens, config.joint_attention_dim),
            "pooled_projections": torch.empty(1, config.pooled_projection_dim),
            "img_ids": torch.empty(patches, 3),
            "txt_ids": torch.empty(tokens, 3),
        }
    if family == "sd3":
        return {
            "hidden_states": latents,
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.empty(1, tokens, config.joint_attention_dim),
            "pooled_projections": torch.empty(1, config.pooled_projection_dim),
        }
    inputs: dict[str, Any] = {"sample": latents, "timestep": torch.ones(1, dtype=torch.long)}
    inputs["encoder_hidden_states"] = torch.empty(1, tokens, config.cross_attention_dim)
    if family == "sdxl":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
    return inputs


def upcasts_vae(model: ModelConfig) -> bool:
    """Whether a float16 model has its VAE in float32, as `spo.models.autoencoder` decides it.

    A VAE of `model.vae` that is not here counts as one that was made for half precision.
    """
    if model.family != "sdxl" or model.dtype != "float16":
        return False
    if model.vae and config_of(model.vae) is None:
        return False
    settings: Any = part_of(model, "vae").config
    return bool(settings.force_upcast)


def outputs_of_decoder(model: ModelConfig) -> Outputs:
    """Of the autoencoder, as it decodes one image."""
    return _outputs_of_decoder(part_of(model, "vae"), latent_size(model))


@cache
def _outputs_of_decoder(vae: Any, size: tuple[int, int, int]) -> Outputs:
    return _outputs(vae, lambda: vae.decode(torch.empty(1, *size, device="meta")))


def outputs_of_images(source: str | None) -> Outputs:
    """Of the preference model that starts from a CLIP, for one image."""
    return _outputs_of_images(clip_of(source))


@cache
def _outputs_of_images(clip: CLIPModel) -> Outputs:
    with torch.device("meta"):
        model, size = _step_aware(clip), clip.config.vision_config.image_size
        t = torch.ones(1, dtype=torch.long)
        return _outputs(model, lambda: model.modulated_features(torch.empty(1, 3, size, size), model.modulations(t)))


@cache
def outputs_of_caption(encoder: Any) -> Outputs:
    """Of a CLIP's text encoder, for one caption."""
    ids = torch.zeros(1, encoder.config.max_position_embeddings, dtype=torch.long, device="meta")
    return _outputs(encoder, lambda: encoder(input_ids=ids))


def _outputs(network: nn.Module, call: Any) -> Outputs:
    """What the modules put out in a call on the meta device, which computes nothing."""
    of: dict[str, int] = {}
    blocks: dict[str, int] = {}
    products: dict[str, int] = {}
    sizes: list[int] = []
    names = [name for name, module in network.named_modules() if type(module).__name__ in CHECKPOINTED]

    def note(name: str, module: nn.Module, output: Any) -> None:
        count = _numel(output)
        sizes.append(count)
        of[name] = of.get(name, 0) + count
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            products[name] = products.get(name, 0) + count * module.weight[0].numel()
        for block in names:  # of one whose parts are called one by one, its last part counts
            if name.startswith(f"{block}."):
                blocks[block] = count

    def note_block(name: str, output: Any) -> None:
        blocks[name] = _numel(output)

    hooks = []
    for name, module in network.named_modules():
        if not any(module.children()):
            hooks.append(module.register_forward_hook(lambda m, _, output, name=name: note(name, m, output)))
        elif name in names:
            hooks.append(module.register_forward_hook(lambda _, __, output, name=name: note_block(name, output)))
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return Outputs(of, blocks, max(sizes), products)


def _numel(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.numel()
    return sum(map(_numel, output)) if isinstance(output, (tuple, list)) else 0
