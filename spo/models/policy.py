"""What training leaves and others take: the policy's weights, a LoRA or after full fine-tuning the whole UNet."""

import copy
from pathlib import Path
from typing import Literal

from diffusers import UNet2DConditionModel
from safetensors import SafetensorError

from spo.errors import ModelError, one_line
from spo.models.base import LatentDiffusion, has_adapter
from spo.models.lora import load_lora, save_kohya, save_lora
from spo.runtime.files import atomic_path

UNET = "unet"  # the folder of a whole UNet within a checkpoint

Format = Literal["diffusers", "kohya", "merged"]


def save_policy(denoiser: LatentDiffusion, folder: str | Path) -> None:
    """Write a checkpoint: a LoRA that diffusers' `load_lora_weights` takes, or `unet/` where all of it was trained."""
    if has_adapter(denoiser.unet):
        save_lora(denoiser, folder)
        return
    with atomic_path(folder) as temporary:
        denoiser.unet.save_pretrained(temporary / UNET, safe_serialization=True)


def load_policy(denoiser: LatentDiffusion, source: str | Path) -> None:
    """Make the policy that of a checkpoint, or of any LoRA that `load_lora` takes; the reference stays the base.

    A whole UNet comes frozen, in the base's dtype. ModelError if it is missing, damaged or of another base model.
    """
    denoiser.restore()
    folder = Path(source) / UNET
    if not folder.is_dir():
        load_lora(denoiser, source)
        return
    if has_adapter(denoiser.unet):
        denoiser.unet.unload_lora()
    try:
        unet = UNet2DConditionModel.from_pretrained(folder, dtype=denoiser.dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded: {one_line(error)}; run the align stage again") from None
    shapes = [{name: weight.shape for name, weight in net.state_dict().items()} for net in (unet, denoiser.unet)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"{folder} is the UNet of another base model; name the one that it was trained from as `model`"
        )
    denoiser.replace(unet.to(denoiser.device))


def save_merged(denoiser: LatentDiffusion, folder: str | Path) -> None:
    """Write the whole pipeline with the policy as its UNet, the LoRA added into the weights."""
    unet = copy.deepcopy(denoiser.unet).float().requires_grad_(False)
    if has_adapter(unet):
        unet.fuse_lora()
        unet.unload_lora()
    merged = copy.copy(denoiser.pipeline)
    merged.register_modules(unet=unet.to(denoiser.dtype))
    with atomic_path(folder) as temporary:
        merged.save_pretrained(temporary, safe_serialization=True)


def export(denoiser: LatentDiffusion, format: Format, out: Path) -> None:
    """Write the policy for others: a LoRA folder, a LoRA file of kohya's names, or a whole pipeline.

    ModelError where there is no LoRA to write, or `out` has another kind of name.
    """
    if format == "merged":
        save_merged(denoiser, out)
    elif not has_adapter(denoiser.unet):
        raise ModelError(f"--format {format} needs a LoRA, but the whole UNet was trained; use --format merged")
    elif format == "diffusers":
        save_lora(denoiser, out)
    else:
        save_kohya(denoiser, out)
