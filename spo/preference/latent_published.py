"""The published layout of latent preference models: casiatao/LRM, written and read by Kwai-Kolors/LPO.

    unet/             a whole diffusers UNet, of which the up path and the output convolution are not used
    text_encoder/     (SDXL: text_encoder_2/ also) in transformers' format
    state_dict.pt     {visual_projection: {weight}, text_projection: {weight} (SD v1.5 only), logit_scale}

Tokenizers, guidance and the autoencoder come from elsewhere: from the base model and the configuration.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from spo.errors import ModelError, one_line
from spo.preference.checkpoint import weight_problems
from spo.preference.latent import GUIDANCE_SCALE, LatentPreferenceModel, half_of
from spo.preference.latent_checkpoint import ENCODERS, TOKENIZERS, LatentPreference, read_text_tokenizer
from spo.preference.latent_space import LatentSpace
from spo.runtime import hub
from spo.runtime.files import atomic_path

HEADS = "state_dict.pt"
FOLDERS = ("text_encoder", "text_encoder_2")
BASE_FILES = ["tokenizer/*", "tokenizer_2/*", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
_LAYOUT = f"give a folder with unet/, text_encoder/ and {HEADS}, such as one of casiatao/LRM"


def read_published_latent(
    folder: str | Path,
    base: str | Path,
    *,
    guidance_scale: float = GUIDANCE_SCALE,
    num_guided: int = 1,
    image_size: int | None = None,
) -> LatentPreference:
    """A published checkpoint, float32 on the CPU; two text encoders make it an SDXL one.

    base: the diffusers model it is of (folder or hub name); it lends the tokenizers, and its autoencoder is the one
    whose latents the model is then known to read. image_size: None for the UNet's sample size in pixels.
    Of the pickle only tensors and numbers are read. ModelError where something is missing or does not fit.
    """
    folder, base_folder = Path(folder), _base_folder(base)
    family = "sdxl" if (folder / FOLDERS[1]).is_dir() else "sd15"
    unet = _read_part(UNet2DConditionModel, folder / "unet", use_safetensors=True)
    encoders = [_read_part(kind, folder / name) for kind, name in zip(ENCODERS[family], FOLDERS, strict=False)]
    heads = _read_heads(folder / HEADS)
    visual = heads.get("visual_projection.weight")
    vae = _read_part(AutoencoderKL, base_folder / "vae") if (base_folder / "vae").is_dir() else None
    factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    model = LatentPreferenceModel(
        half_of(unet),
        encoders,
        projection_size=visual.shape[0] if visual is not None and visual.ndim else 1,
        image_size=image_size or unet.config.sample_size * factor,
        guidance_scale=guidance_scale,
        num_guided=num_guided,
    )
    _fill_heads(model, heads, folder / HEADS)
    tokenizers = tuple(
        read_text_tokenizer(base_folder / name, each) for name, each in zip(TOKENIZERS, encoders, strict=False)
    )
    return LatentPreference(model.float().eval(), tokenizers, vae and LatentSpace.of(vae))


def write_published_latent(preference: LatentPreference, folder: str | Path) -> None:
    """Write the published layout; it is whole or not there. What of the UNet is not used is written as zeros."""
    model = preference.model
    with torch.device("meta"):
        whole = UNet2DConditionModel.from_config(model.unet.config)
    own = model.unet.state_dict()
    unet = {
        name: own.get(name, torch.zeros(meta.shape)).cpu().contiguous() for name, meta in whole.state_dict().items()
    }
    heads: dict[str, Any] = {"visual_projection": {"weight": model.visual_projection.weight.detach().cpu()}}
    if model.text_projection is not None:
        heads["text_projection"] = {"weight": model.text_projection.weight.detach().cpu()}
    with atomic_path(folder) as temporary:
        (temporary / "unet").mkdir(parents=True)
        save_file(unet, temporary / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        model.unet.save_config(temporary / "unet")
        for name, encoder in zip(FOLDERS, model.text_encoders, strict=False):
            _write_encoder(encoder, temporary / name)
        torch.save({**heads, "logit_scale": model.logit_scale.item()}, temporary / HEADS)


def _write_encoder(encoder: Any, folder: Path) -> None:
    """As older transformers do, which the published code uses: all names of a CLIPTextModel start with text_model."""
    starts = ("text_model.", "text_projection.")
    weights = {
        name if name.startswith(starts) else f"text_model.{name}": tensor.cpu().contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    folder.mkdir()
    encoder.config.architectures = [type(encoder).__name__]
    encoder.config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _read_heads(file: Path) -> dict[str, Tensor]:
    """The projections' weights and the logit scale by the model's own names."""
    with _one_line_errors(file):
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ModelError(f"{file} holds no projections but a {type(state).__name__}; {_LAYOUT}")
    heads: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            heads |= {f"{name}.{inner}": tensor for inner, tensor in value.items()}
        else:
            heads[str(name)] = value
    scale = heads.get("logit_scale")
    if isinstance(scale, float) or (isinstance(scale, Tensor) and scale.numel() == 1):
        heads["logit_scale"] = torch.as_tensor(scale, dtype=torch.float32).reshape(())
    if wrong := [name for name, value in heads.items() if not isinstance(value, Tensor)]:
        raise ModelError(f"{file} holds no tensor under {wrong[0]}; {_LAYOUT}")
    return heads


def _fill_heads(model: LatentPreferenceModel, heads: dict[str, Tensor], file: Path) -> None:
    state = model.state_dict()
    own = {name: tensor for name, tensor in state.items() if not name.startswith(("unet.", "text_encoders."))}
    if found := weight_problems({name: tensor.shape for name, tensor in own.items()}, heads):
        raise ModelError(
            f"{file} does not fit the UNet of {sum(model.widths)} features and the {model.num_text_encoders} text "
            f"encoder(s) beside it: it {found}; {_LAYOUT}"
        )
    for name, tensor in own.items():
        tensor.copy_(heads[name])


def _read_part(kind: Any, folder: Path, **options: Any) -> Any:
    """A diffusers or transformers model in float32; ModelError if it is missing, damaged or incomplete."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with _one_line_errors(folder):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError("there is no config.json in it")
        part, report = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **options
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{folder} lacks {len(missing)} weights such as {missing[0]}; {_LAYOUT}")
    return part


def _base_folder(base: str | Path) -> Path:
    if Path(base).is_dir():
        return Path(base)
    if not hub.is_name(base):
        raise ModelError(f"base model {str(base)!r} is no folder here; name the diffusers model the checkpoint is of")
    with hub.loading(f"base model {str(base)!r}", base, "its place", "", hub.only(*BASE_FILES)):
        return Path(snapshot_download(str(base), allow_patterns=BASE_FILES))


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: {one_line(error)}; {_LAYOUT}") from None
    except Exception as error:  # a damaged file has the libraries' readers fail in any way
        raise ModelError(
            f"{path} cannot be read, and no code of it was run: {one_line(error, 160)}; {_LAYOUT}"
        ) from None
