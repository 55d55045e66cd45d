"""Load diffusers repositories, by hub name or local folder, as pipelines and denoisers.

Weights are read from .safetensors only, and no code of a repository is run.
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from spo.config import ModelConfig, SamplingConfig
from spo.errors import ConfigError, ModelError, one_line
from spo.models.autoencoder import Autoencoder
from spo.models.flux import FluxNetwork
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.network import TEXT_ENCODERS, Network, Pipeline, block_kinds
from spo.models.schedulers import plain_scheduler
from spo.models.sd3 import StableDiffusion3Network
from spo.models.sd15 import StableDiffusionNetwork
from spo.models.sdxl import StableDiffusionXLNetwork
from spo.runtime import hub
from spo.runtime.progress import tell_loading

PIPELINES: dict[str, type[Pipeline]] = {
    "sd15": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
}
NETWORKS: dict[str, type[Network]] = {
    "sd15": StableDiffusionNetwork,
    "sdxl": StableDiffusionXLNetwork,
    "sd3": StableDiffusion3Network,
    "flux": FluxNetwork,
}

SETTINGS = ("*.json", "*.txt", "*.model")  # and tokenizers
ONE_PART = hub.only("config.json", "diffusion_pytorch_model.safetensors")
VARIANTS = 256  # compiled versions of one block: widths, batch sizes, adapter on, off or merged, gradients on or off


def build(config: ModelConfig, sampling: SamplingConfig, device: torch.device | str) -> LatentDiffusion:
    """The configured model as a Denoiser, frozen."""
    return assemble(load_pipeline(config, device), config, sampling)


def assemble(pipeline: Pipeline, config: ModelConfig, sampling: SamplingConfig) -> LatentDiffusion:
    """A pipeline with a plain scheduler as a Denoiser, frozen; ModelError if the settings do not fit it."""
    family = NETWORKS[config.family]
    _check_grid(pipeline, config, sampling)
    multiple = pipeline.vae_scale_factor * family.patch_size
    if any(side % multiple for side in config.size):
        raise ModelError(f"model.resolution={config.resolution} must be a multiple of {multiple}")
    if config.bucket_step and config.bucket_step % multiple:
        raise ModelError(f"model.bucket_step={config.bucket_step} must be a multiple of {multiple}")
    network = family(
        pipeline,
        resolution=config.resolution,
        t5_tokens=config.t5_tokens,
        keep_prompts=config.keep_prompts,
        offload_text_encoders=config.offload_text_encoders,
    )
    if config.gradient_checkpointing:
        network.module.enable_gradient_checkpointing()
    autoencoder = Autoencoder(pipeline.vae, resolution=config.resolution, upcast=network.upcasts_vae)
    if config.compile:
        for module in (network.module, autoencoder.vae):
            compile_blocks(module)
    return LatentDiffusion(network, network.sampler(sampling), autoencoder)


def load_pipeline(config: ModelConfig, device: torch.device | str) -> Pipeline:
    """The pipeline of `config.path`, with a DDIM or flow Euler scheduler and without safety checker or progress bars.

    ModelError if it is missing, incomplete, of another family, or without .safetensors weights.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, config.dtype)
    parts: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    if config.family == "sd15":
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    if config.vae is not None:
        with _explained("model.vae", config.vae, ONE_PART):
            parts["vae"] = AutoencoderKL.from_pretrained(config.vae, dtype=dtype, use_safetensors=True)
    load = _load_single_file if config.is_single_file else _load_repository
    with _explained("model.path", config.path, files_of(config)):
        tell_loading(f"the base model {config.path!r}", _weights_of(config))
        pipeline = load(config, dtype, parts)
        _require_whole(pipeline, config.path)
        pipeline.scheduler = plain_scheduler(pipeline.scheduler, config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    order_for_convolutions(pipeline, compiled=config.compile)
    return pipeline


def order_for_convolutions(pipeline: Pipeline, *, compiled: bool = False) -> None:
    """Put weights of convolutions into the order that makes them fastest: channels last, but for a GPU's plain VAE.

    There torch's group norm would copy its input into the other order and back (docs/performance.md).
    """
    layout: dict[str, Any] = {"memory_format": torch.channels_last}
    if "unet" in pipeline.components:
        pipeline.unet.to(**layout)
    if compiled or pipeline.vae.device.type == "cpu":
        pipeline.vae.to(**layout)


def _load_repository(config: ModelConfig, dtype: torch.dtype, parts: dict[str, Any]) -> Pipeline:
    index = _checked_index(config, config.path)
    _require_variant(config)
    if config.family == "sd3" and not (config.t5 and index.get("text_encoder_3", [None])[0]):
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    for name in set(TEXT_ENCODERS) & set(index) - set(parts):
        kind = getattr(transformers, str(index[name][1]), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            parts[name] = _load_text_encoder(config, name, kind, dtype)
    return PIPELINES[config.family].from_pretrained(
        config.path, revision=config.revision, variant=config.variant, dtype=dtype, use_safetensors=True, **parts
    )


def _load_text_encoder(config: ModelConfig, name: str, kind: Any, dtype: torch.dtype) -> Any:
    """A text encoder of a repository; ModelError if a weight is missing, which the pipeline would draw at random."""

    def load(variant: str | None) -> Any:
        return kind.from_pretrained(
            config.path,
            subfolder=name,
            revision=config.revision,
            variant=variant,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )

    try:
        encoder, report = load(config.variant)
    except OSError:
        if config.variant is None:
            raise
        encoder, report = load(None)  # as diffusers does for a part without the variant
    if report["missing_keys"]:
        raise ModelError(f"model.path={config.path!r}: its {name} lacks {min(report['missing_keys'])}; get it again")
    return encoder


def _require_whole(pipeline: Pipeline, path: str) -> None:
    """ModelError if a weight is missing: diffusers leaves it without values."""
    for name, part in pipeline.components.items():
        missing = (
            [key for key, weight in part.named_parameters() if weight.is_meta] if isinstance(part, nn.Module) else []
        )
        if missing:
            raise ModelError(f"model.path={path!r}: its {name} lacks {missing[0]}; get it again")


def _load_single_file(config: ModelConfig, dtype: torch.dtype, parts: dict[str, Any]) -> Pipeline:
    """The weights of the file, with the tokenizers and settings of `model.config` or of the repository of its kind."""
    with safe_open(config.path, "pt") as file:
        weights = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    source = config.config or fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
    if config.family == "sd3" and not config.t5:
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    remedy = "it should be a folder that diffusers' save_pretrained wrote, of the kind of the file"
    with hub.loading(f"model.config={source!r}", source, "model.config", remedy, hub.only(*SETTINGS)):
        _checked_index(config, source)
        try:
            pipeline = PIPELINES[config.family].from_single_file(config.path, config=source, dtype=dtype, **parts)
        except (TypeError, AttributeError, SingleFileComponentError) as error:  # the file holds something else
            raise ValueError(f"{config.path} is no {config.family} model: {one_line(error)}") from None
    if "v_pred" in weights and pipeline.scheduler.config.prediction_type != "v_prediction":
        raise ModelError(
            f"model.path={config.path!r} predicts v, but model.config={source!r} is for prediction_type "
            f"{pipeline.scheduler.config.prediction_type}; name one for v_prediction as model.config"
        )
    return pipeline


def compile_blocks(module: Any) -> None:
    """Compile the transformer and residual blocks of a network or a VAE when they are first called.

    Equal blocks share their code. Every new shape compiles again, e.g. a smaller last batch. torch caches the code for
    later processes. ConfigError without a C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"model.compile=true needs a C++ compiler, but there is no {compiler}; install it, or set CXX"
        )
    torch._dynamo.config.recompile_limit = VARIANTS
    module._repeated_blocks = block_kinds(module)
    module.compile_repeated_blocks(dynamic=False)


def load_tiny_vae(path: str, policy: LatentDiffusion) -> AutoencoderTiny:
    """A small autoencoder for the policy's latents, such as madebyollin/taesd or taesdxl; ModelError as above."""
    with _explained("scoring.tiny_vae", path, ONE_PART):
        vae = AutoencoderTiny.from_pretrained(path, dtype=policy.dtype, use_safetensors=True)
    if vae.config.latent_channels != policy.latent_shape[0]:
        raise ModelError(
            f"scoring.tiny_vae={path!r} decodes {vae.config.latent_channels} channels, the model has "
            f"{policy.latent_shape[0]}; use one that was made for it"
        )
    return vae.to(policy.device).eval().requires_grad_(False)


def _check_grid(pipeline: Pipeline, config: ModelConfig, sampling: SamplingConfig) -> None:
    """ModelError for a diffusion grid whose last step is from t = 0 to t = 0, which has no noise and so no density."""
    total = pipeline.scheduler.config.num_train_timesteps
    if sampling.steps > total:
        raise ModelError(f"sampling.steps={sampling.steps} is more than the {total} timesteps of {config.path!r}")
    if config.is_flow:
        return
    pipeline.scheduler.set_timesteps(sampling.steps)
    if sampling.eta > 0 and pipeline.scheduler.timesteps[-1] == 0:
        raise ModelError(
            f"model.path={config.path!r}: its scheduler samples the timestep 0, from which there is no step to take; "
            'set "steps_offset": 1 in its scheduler/scheduler_config.json, as Stable Diffusion has it'
        )


def _checked_index(config: ModelConfig, repository: str) -> dict[str, Any]:
    """The repository's model_index.json; ModelError if it is of another family."""
    index = DiffusionPipeline.load_config(repository, revision=config.revision)
    found, expected = index.get("_class_name"), PIPELINES[config.family].__name__
    if found != expected:
        fitting = next((name for name, kind in PIPELINES.items() if kind.__name__ == found), None)
        remedy = f"set model.family={fitting}" if fitting else f"families: {', '.join(PIPELINES)}"
        raise ModelError(f"{repository!r} holds a {found}, but family {config.family} is a {expected}; {remedy}")
    return index


def _require_variant(config: ModelConfig) -> None:
    """ModelError if a folder's network has only weights of a variant, and `model.variant` names none."""
    files = (Path(config.path) / NETWORKS[config.family].component).glob("*.safetensors")
    stems = {re.sub(r"-\d+-of-\d+", "", file.stem) for file in files}
    variants = sorted(stem.partition(".")[2] for stem in stems)
    if config.variant is None and variants and "" not in variants:
        raise ModelError(
            f"model.path={config.path!r} has only weights of {' and '.join(variants)}; set model.variant={variants[0]}"
        )


def _weights_of(config: ModelConfig) -> list[Path]:
    """The files of the model's weights where they are here, in a folder or in the hub's cache."""
    path = Path(config.path)
    if path.is_file():
        return [path]
    if hub.is_name(config.path):
        cached = try_to_load_from_cache(config.path, "model_index.json", revision=config.revision)
        path = Path(cached).parent if isinstance(cached, str) else path
    return [*path.glob("*/*.safetensors")]


def files_of(config: ModelConfig) -> str:
    """Options of `hf download` for what is read of a repository: one variant of its weights, as .safetensors."""
    variant = config.variant
    weights = [f"*/*.{variant}*.safetensors"] if variant else ["*/*model.safetensors", "*/*model-*.safetensors"]
    unread = ["safety_checker/*", *(["text_encoder_3/*"] if config.family == "sd3" and not config.t5 else [])]
    revision = f" --revision {config.revision}" if config.revision else ""
    return hub.only(*SETTINGS, *weights, but=unread) + revision


@contextmanager
def _explained(key: str, path: str, files: str) -> Iterator[None]:
    """Turn the libraries' errors while loading `path` into a ModelError of one line."""
    if (
        not Path(path).is_dir()
        and not hub.is_name(path)
        and not (path.endswith(".safetensors") and Path(path).is_file())
    ):
        raise ModelError(f"{key}={path!r} is no folder here; put a diffusers model there, or name one on the hub")
    remedy = "it should be a folder that diffusers' save_pretrained wrote, with .safetensors weights"
    with hub.loading(f"{key}={path!r}", path, key, remedy, files), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers' own, on every hub name
        yield
