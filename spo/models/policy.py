"""Save, load and export the policy: a LoRA, or the whole network after full fine-tuning."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from spo.errors import ModelError, one_line
from spo.models.lora import load_lora, save_kohya, save_lora
from spo.models.network import Network
from spo.runtime import distributed, hub
from spo.runtime.files import atomic_path
from spo.runtime.sharding import gathered, plain_class

WHOLE = ("unet", "transformer")  # folders of a whole network within a checkpoint

Format = Literal["diffusers", "kohya", "merged"]


def save_policy(network: Network, folder: str | Path) -> None:
    """Write a checkpoint: a LoRA for diffusers' `load_lora_weights`, or the whole network if all of it was trained.

    If the network is sharded, all processes must call this; only the first one writes a whole network.
    """
    if network.has_adapter:
        save_lora(network, folder)
        return
    module = network.module
    if network.is_sharded:
        weights = gathered(module.state_dict())
        if not distributed.is_main():
            return
        with torch.device("meta"):
            module = plain_class(module).from_config(module.config)
        module.load_state_dict(weights, assign=True)
    with atomic_path(folder) as temporary:
        module.save_pretrained(temporary / network.component, safe_serialization=True)


def load_policy(network: Network, source: str | Path) -> None:
    """Load the policy from a checkpoint or any LoRA that `load_lora` accepts; the reference stays the base.

    A whole network is frozen and has the base's dtype. ModelError if it is missing, damaged or of another base model.
    """
    network.restore()
    folder = Path(source) / network.component
    if not folder.is_dir():
        load_lora(network, source)
        return
    try:
        whole = type(network.module).from_pretrained(folder, dtype=network.dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded: {one_line(error)}; run the align stage again") from None
    network.replace(whole, source=folder)


@contextmanager
def published_network(
    network: Network, source: str | Path, *, subfolder: str | None = None, revision: str | None = None
) -> Iterator[None]:
    """Inside this context the policy is a published network, such as LPO's merged UNets; afterwards it is the base.

    source: a folder or a hub repository, with the weights in its `subfolder`. ModelError if they are missing or of
    another base model.
    """
    remedy = "it should be a network that diffusers' save_pretrained wrote, with .safetensors weights"
    place = f"{subfolder}/" if subfolder else ""
    files = (f"{place}{name}" for name in ("config.json", "*model.safetensors", "*model-*.safetensors"))
    with hub.loading(f"network {source}", source, "its place", remedy, hub.only(*files)):
        module = type(network.module).from_pretrained(
            str(source), subfolder=subfolder, revision=revision, dtype=network.dtype, use_safetensors=True
        )
    network.replace(module, source=source)
    try:
        yield
    finally:
        network.restore()


def save_merged(network: Network, folder: str | Path) -> None:
    """Write the whole pipeline with the policy as its network, the LoRA added into the weights."""
    whole = copy.deepcopy(network.module).float().requires_grad_(False)
    if network.has_adapter:
        whole.fuse_lora()
        whole.unload_lora()
    merged = copy.copy(network.pipeline)
    merged.register_modules(**{network.component: whole.to(network.dtype)})
    with atomic_path(folder) as temporary:
        merged.save_pretrained(temporary, safe_serialization=True)


def export(network: Network, format: Format, out: Path) -> None:
    """Write the policy as a LoRA folder, a LoRA file with kohya's names, or a whole pipeline.

    ModelError for a LoRA format if the whole network was trained.
    """
    if format == "merged":
        save_merged(network, out)
    elif not network.has_adapter:
        raise ModelError(f"--format {format} needs a LoRA, but the whole network was trained; use --format merged")
    elif format == "diffusers":
        save_lora(network, out)
    else:
        save_kohya(network, out)
