"""A LoRA's weights from a file or hub repository, whoever wrote it: kohya's, diffusers' and peft's layouts.

Only .safetensors is read. Every weight counts: what cannot be applied is refused, never left out.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from spo.core.precision import all_finite
from spo.errors import ModelError
from spo.models.network import TEXT_ENCODERS, Network
from spo.runtime import hub
from spo.runtime.files import read_json

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_WEIGHTS = "adapter_model.safetensors"  # peft's
PEFT_PREFIX = "base_model.model."
PEFT_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_PART = re.compile(r"(.+?)[._](?:lora(?:_linear_layer)?\.|lora_)(down|up|A|B)\.weight")


def read_lora(
    network: Network, source: str | Path, weight_name: str | None = None, revision: str | None = None
) -> dict[str, Tensor]:
    """The weights with the scale alpha / rank multiplied into B, so that it is 1.

    The names of the denoising network's are peft's, after its component; those of text encoders are diffusers'.

    ModelError for another format, weights that no LoRA of this pipeline has, or values that are not finite.
    """
    path = Path(source)
    chosen = path.name if path.is_file() else weight_name
    if chosen is not None and not chosen.endswith(".safetensors"):
        raise ModelError(f"LoRA {source}: {chosen} is no .safetensors file; other formats can run code and are refused")
    if weight_name is None and (path / WEIGHTS).is_file():
        weight_name = WEIGHTS
    raw, settings = _fetch(network, source, weight_name, revision)
    for name, weight in raw.items():
        if not (_PART.fullmatch(name) or name.endswith(".alpha")):
            raise ModelError(
                f"LoRA {source} holds {name}, which cannot be applied: only LoRA and LoCon (down, up and alpha) are "
                "read, not DoRA, LoHa, LoKr and others; give a plain LoRA for the same base model"
            )
        if not all_finite(weight):
            raise ModelError(
                f"LoRA {source}: {name} holds values that are not finite; its training failed, use another"
            )
    options: dict[str, Any] = {"unet_config": network.module.config, "return_lora_metadata": True}
    state, *_ = network.pipeline.lora_state_dict(_scaled_by_alpha(raw), **options)
    _scale_by_settings(state, settings)
    known = (network.component, *TEXT_ENCODERS)
    if other := [name for name in state if name.split(".")[0] not in known]:
        raise ModelError(
            f"LoRA {source} fits no layer: {other[0]} is no part of {' or '.join(known)}; give one for the same base "
            "model"
        )
    return _in_peft_names(state, f"{network.component}.")


def _in_peft_names(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    network = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
    others = {name: weight for name, weight in state.items() if not name.startswith(prefix)}
    return {prefix + name: weight for name, weight in convert_unet_state_dict_to_peft(network).items()} | others


def _fetch(
    network: Network, source: str | Path, weight_name: str | None, revision: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's weights, and what it or peft's adapter_config.json says of ranks and alphas, by component."""
    options: dict[str, Any] = dict.fromkeys(("local_files_only", "cache_dir", "proxies", "token", "subfolder"))
    options |= {"use_safetensors": True, "force_download": False, "allow_pickle": False, "user_agent": {}}
    raw, metadata = _fetch_state_dict(str(source), weight_name, revision=revision, **options)
    if not all(name.startswith(PEFT_PREFIX) for name in raw):
        return raw, metadata or {}
    settings = {key: value for key, value in _adapter_config(source, revision).items() if key in PEFT_SETTINGS}
    prefix = f"{network.component}."
    weights = {prefix + name.removeprefix(PEFT_PREFIX).replace(".default.", "."): raw[name] for name in raw}
    return weights, {prefix + key: value for key, value in settings.items()}


def _adapter_config(source: str | Path, revision: str | None) -> dict[str, Any]:
    """peft's settings beside the weights: without them the strength is unknown."""
    file = "adapter_config.json"
    path = Path(source)
    path = (path.parent if path.is_file() else path) / file
    if not path.is_file() and hub.is_name(source):
        with suppress(EntryNotFoundError, LocalEntryNotFoundError):
            path = Path(hf_hub_download(str(source), file, revision=revision))
    if not path.is_file():
        raise ModelError(f"LoRA {source} is in peft's layout, but its {file} is missing; put it beside the weights")
    return read_json(path)


def _scaled_by_alpha(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kohya's alphas, a tensor for each layer, multiplied into the weights; without one the scale is 1."""
    state = {name: weight for name, weight in raw.items() if not name.endswith(".alpha")}
    for layer, up, rank in _layers(state):
        if (alpha := raw.get(f"{layer}.alpha")) is not None:
            state[up] = _scaled(state[up], alpha.item() / rank)
    return state


def _scale_by_settings(state: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
    """The alphas that diffusers and peft keep beside the weights, by component; without them the scale is 1."""
    for layer, up, rank in _layers(state):
        component, _, name = layer.partition(".")
        own = {key: settings.get(f"{component}.{key}") for key in PEFT_SETTINGS}
        if given := {key: value for key, value in own.items() if value is not None}:
            config = LoraConfig(**given)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
            state[up] = _scaled(state[up], alpha / (rank**0.5 if config.use_rslora else rank))


def _layers(state: Mapping[str, Tensor]) -> list[tuple[str, str, int]]:
    """Each layer with the name of its up-weight, and its rank."""
    found = []
    for name, weight in state.items():
        part = _PART.fullmatch(name)
        if part and part[2] in ("up", "B"):
            found.append((part[1], name, weight.shape[1]))
    return found


def _scaled(weight: Tensor, factor: float) -> Tensor:
    return weight if factor == 1 else weight.float() * factor
