"""The policy's LoRA: add, save for diffusers or for web user interfaces, load; and use published LoRAs for a while."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
)
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from spo.config import LoraConfig
from spo.core.precision import all_finite
from spo.errors import ModelError, one_line
from spo.models.lora_file import WEIGHTS, read_lora
from spo.models.network import TEXT_ENCODERS, Network
from spo.runtime import hub
from spo.runtime.files import atomic_path
from spo.runtime.sharding import whole

EXPECTED = f"it should be a folder with {WEIGHTS}, a .safetensors file or a hub repository, for the same base model"


def add_lora(module: Any, config: LoraConfig, *, seed: int) -> None:
    """Attach a trainable LoRA in float32 that changes nothing yet: A ~ N(0, 1 / rank^2) from the seed, B = 0.

    alpha = rank, so the update is B A unscaled. ModelError if the module has none of the targets.
    """
    peft_config = PeftConfig(
        r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian", target_modules=list(config.targets)
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            module.add_adapter(peft_config)
        except ValueError as error:
            raise ModelError(
                f"lora.targets={list(config.targets)} do not fit this {type(module).__name__}: {one_line(error)}"
            ) from None
    _train_in_float32(module)


def _train_in_float32(module: nn.Module) -> None:
    """Make the LoRA's weights float32, cast to the dtype of a layer's input when they are used.

    peft's own layers cast every input to float32 instead, which is a copy of all activations.
    """
    cast_training_params(module, torch.float32)
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.__class__ = CASTING.get(type(part), type(part))


class CastingLinear(nn.Linear):
    """A linear layer without bias that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


class CastingConv2d(nn.Conv2d):
    """A convolution without bias that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.to(input.dtype), None)


CASTING: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: CastingLinear, nn.Conv2d: CastingConv2d}


def save_lora(network: Network, folder: str | Path) -> None:
    """Write a folder for diffusers' `pipeline.load_lora_weights(folder)`."""
    layers = _layers(network)
    if network.component == "unet":
        converted = convert_state_dict_to_diffusers(layers)
        # it renames those of attention alone, and diffusers reads no file with both kinds of names
        layers = converted if not any(".lora_A." in name for name in converted) else layers
    with atomic_path(folder) as temporary:
        network.pipeline.save_lora_weights(temporary, **{f"{network.component}_lora_layers": layers})


def copy_lora(source: Path, folder: str | Path) -> None:
    """Write a LoRA that `save_lora` wrote to another folder, without its network; ModelError if it is damaged."""
    file = source / WEIGHTS
    try:
        good = all(map(all_finite, load_file(file).values()))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}; run the stage that wrote it again") from None
    if not good:
        raise ModelError(f"{file} holds values that are not finite; its training failed, use another")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        shutil.copyfile(file, temporary / WEIGHTS)


def save_kohya(network: Network, file: str | Path) -> None:
    """Write a .safetensors file for AUTOMATIC1111, ComfyUI and similar programs.

    A UNet's has kohya's names and alpha; a transformer's has diffusers' names, which ComfyUI reads (comfy/lora.py).
    """
    layers = _layers(network)
    state = {f"{network.component}.{name}": weight for name, weight in layers.items()}
    if network.component == "unet":
        state = convert_state_dict_to_kohya(state)
    rank = max(len(weight) for name, weight in layers.items() if ".lora_A." in name)
    with atomic_path(file) as temporary:
        weights = {name: weight.float().cpu().contiguous() for name, weight in state.items()}
        save_file(weights, temporary, metadata=_kohya_metadata(network, Path(file).stem, rank))


def _kohya_metadata(network: Network, title: str, rank: int) -> dict[str, str]:
    """What web user interfaces read to file a LoRA by its base (kohya-ss/sd-scripts, Stability's modelspec)."""
    version, architecture = {
        "StableDiffusionPipeline": ("sd_v1", "stable-diffusion-v1"),
        "StableDiffusionXLPipeline": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
        "StableDiffusion3Pipeline": ("sd3", "stable-diffusion-3"),
        "FluxPipeline": ("flux1", "flux-1-dev"),
    }[type(network.pipeline).__name__]
    return {
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
    }


def _layers(network: Network) -> dict[str, Tensor]:
    """The adapter's weights, padded with zeros to one rank: programs disagree about the scale of mixed ranks."""
    layers = {name: whole(weight) for name, weight in get_peft_model_state_dict(network.module).items()}
    rank = max(len(weight) for name, weight in layers.items() if ".lora_A." in name)
    padded = {}
    for name, weight in layers.items():
        axis = 0 if ".lora_A." in name else 1
        shape = list(weight.shape)
        shape[axis] = rank - shape[axis]
        padded[name] = torch.cat([weight, weight.new_zeros(shape)], axis) if shape[axis] else weight
    return padded


def load_lora(network: Network, source: str | Path) -> None:
    """Replace the policy's LoRA by one from a folder, a file or a hub repository, in any layout of `read_lora`.

    It is then trainable and in float32, and its update is B A unscaled, as `add_lora` makes it. ModelError if it is
    missing, also changes a text encoder (which the reference could not undo) or was made for another base model.
    """
    module, prefix = network.module, network.component
    with hub.loading(f"LoRA {source}", source, "its place", EXPECTED, _files("*.safetensors")):
        state = read_lora(network, source)
        others = sorted({name.split(".")[0] for name in state if not name.startswith(f"{prefix}.")})
        if others or not state:
            raise ModelError(f"LoRA {source} changes {others or 'nothing'}; it should change the {prefix} alone")
        if network.has_adapter:
            module.unload_lora()
        module.load_lora_adapter(state, prefix=prefix, adapter_name="default")
        _require_all(module, state, prefix, source)
        _train_in_float32(module)
        weights = {name.removeprefix(f"{prefix}."): weight for name, weight in state.items()}
        set_peft_model_state_dict(module, weights)  # loading rounded to the base's dtype


def _files(weights: str) -> str:
    return hub.only(weights, "adapter_config.json")


@contextmanager
def published_lora(
    network: Network, source: str | Path, *, weight_name: str | None = None, revision: str | None = None
) -> Iterator[None]:
    """Inside this context the pipeline has a published LoRA, of network and text encoders, instead of the policy's own.

    It is loaded like in diffusers, from a folder, a .safetensors file or a hub repository, with diffusers' or kohya's
    names; afterwards the pipeline is the base. ModelError if it is missing or fits no layer of this pipeline.
    """
    network.restore()
    pipeline = network.pipeline
    pipeline.unload_lora_weights()
    try:
        with hub.loading(f"LoRA {source}", source, "its place", EXPECTED, _files(weight_name or "*.safetensors")):
            state = read_lora(network, source, weight_name, revision)
            if not state:
                raise ModelError(f"LoRA {source} holds no weights; give one for the same base model")
            if any(key.startswith(f"{network.component}.") for key in state):
                network.module.load_lora_adapter(state, prefix=network.component, _pipeline=pipeline)
                _require_all(network.module, state, network.component, source)
            for name in TEXT_ENCODERS[:2]:
                if any(key.startswith(f"{name}.") for key in state):
                    encoder = getattr(pipeline, name, None)
                    if encoder is None:
                        raise ModelError(
                            f"LoRA {source} changes a {name}, which this model lacks; give one made for it"
                        )
                    pipeline.load_lora_into_text_encoder(state, None, encoder, prefix=name, _pipeline=pipeline)
                    _require_all(encoder, state, name, source)
        yield
    finally:
        pipeline.unload_lora_weights()


def _require_all(module: Any, state: dict[str, Tensor], prefix: str, source: str | Path) -> None:
    """ModelError unless the module took every weight of the LoRA: peft leaves out those of layers that it lacks."""
    given = sum(name.startswith(f"{prefix}.") for name in state)
    adapters = getattr(module, "peft_config", {})
    taken = sum(len(get_peft_model_state_dict(module, adapter_name=name)) for name in adapters)
    if taken != given:
        raise ModelError(
            f"LoRA {source}: {given - taken} of its {given} weights fit no layer of the {prefix}; give one for the "
            "same base model"
        )
