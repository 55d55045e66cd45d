"""The policy's LoRA: add, save for diffusers or for web user interfaces, load; and use published LoRAs for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from spo.config import LoraConfig
from spo.errors import ModelError, one_line
from spo.models.network import TEXT_ENCODERS, Network
from spo.runtime import hub
from spo.runtime.files import atomic_path

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name
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
    cast_training_params(module, torch.float32)


def save_lora(network: Network, folder: str | Path) -> None:
    """Write a folder for diffusers' `pipeline.load_lora_weights(folder)`."""
    layers = get_peft_model_state_dict(network.module)
    if network.component == "unet":
        layers = convert_state_dict_to_diffusers(layers)
    with atomic_path(folder) as temporary:
        network.pipeline.save_lora_weights(temporary, **{f"{network.component}_lora_layers": layers})


def save_kohya(network: Network, file: str | Path) -> None:
    """Write a .safetensors file for AUTOMATIC1111, ComfyUI and similar programs.

    A UNet's has kohya's names and alpha; a transformer's has diffusers' names, which ComfyUI reads (comfy/lora.py).
    """
    layers = get_peft_model_state_dict(network.module)
    state = {f"{network.component}.{name}": weight for name, weight in layers.items()}
    if network.component == "unet":
        state = convert_state_dict_to_kohya(state)
    with atomic_path(file) as temporary:
        save_file({name: weight.float().cpu().contiguous() for name, weight in state.items()}, temporary)


def load_lora(network: Network, source: str | Path) -> None:
    """Replace the policy's LoRA by one from a folder, a file or a hub repository, with diffusers' or kohya's names.

    It is then trainable and in float32. Only .safetensors is read. ModelError if it is missing, also changes a text
    encoder (which the reference could not undo) or was made for another base model.
    """
    module, prefix = network.module, network.component
    with hub.loading(f"LoRA {source}", source, "its place", EXPECTED):
        state, alphas, metadata = _read(network, source)
        others = sorted({name.split(".")[0] for name in state if not name.startswith(f"{prefix}.")})
        if others or not state:
            raise ModelError(f"LoRA {source} changes {others or 'nothing'}; it should change the {prefix} alone")
        if network.has_adapter:
            module.unload_lora()
        module.load_lora_adapter(state, prefix=prefix, network_alphas=alphas, metadata=metadata, adapter_name="default")
        cast_training_params(module, torch.float32)
        weights = {name.removeprefix(f"{prefix}."): weight for name, weight in state.items()}
        # loading rounded to the base's dtype
        set_peft_model_state_dict(module, convert_unet_state_dict_to_peft(weights))


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
        with hub.loading(f"LoRA {source}", source, "its place", EXPECTED):
            state, alphas, metadata = _read(network, source, weight_name, revision)
            if not state:
                raise ModelError(f"LoRA {source} holds no weights; give one for the same base model")
            options = {"network_alphas": alphas, "metadata": metadata, "_pipeline": pipeline}
            network.module.load_lora_adapter(state, prefix=network.component, **options)
            for name in TEXT_ENCODERS[:2]:
                if any(key.startswith(f"{name}.") for key in state):
                    encoder = getattr(pipeline, name, None)
                    if encoder is None:
                        raise ModelError(
                            f"LoRA {source} changes a {name}, which this model lacks; give one made for it"
                        )
                    pipeline.load_lora_into_text_encoder(
                        state, alphas, encoder, prefix=name, metadata=metadata, _pipeline=pipeline
                    )
        yield
    finally:
        pipeline.unload_lora_weights()


def _read(
    network: Network, source: str | Path, weight_name: str | None = None, revision: str | None = None
) -> tuple[dict[str, Tensor], dict[str, float] | None, dict[str, Any] | None]:
    """Weights with diffusers' names, alphas and metadata of a LoRA; only .safetensors is read."""
    path = Path(source)
    chosen = path.name if path.is_file() else weight_name
    if chosen is not None and not chosen.endswith(".safetensors"):
        raise ModelError(f"LoRA {source}: {chosen} is no .safetensors file; other formats can run code and are refused")
    if weight_name is None and (path / WEIGHTS).is_file():
        weight_name = WEIGHTS
    state, *alphas, metadata = network.pipeline.lora_state_dict(
        str(source),
        weight_name=weight_name,
        revision=revision,
        use_safetensors=True,
        unet_config=network.module.config,
        return_alphas=True,  # only FLUX asks
        return_lora_metadata=True,
    )
    return state, alphas[0] if alphas else None, metadata
