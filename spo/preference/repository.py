"""A plain CLIP by hub name or local folder: its configuration, weights, tokenizer and preprocessing.

No code of a repository is run. If a repository has no safetensors, its pickled weights are read as tensors only.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging

from spo.errors import ModelError, one_line
from spo.preference.preprocess import Channels, Mode, Preprocessing
from spo.runtime import hub
from spo.runtime.progress import tell_loading

SMALL_FILES = ["*.json", "merges.txt"]
SAFETENSORS = ["model*.safetensors"]
PICKLED = ["pytorch_model*.bin"]


def fetch(repository: str | Path, patterns: list[str], *, later: Sequence[str] = ()) -> Path:
    """The local folder of a repository: itself, or the hub's cache with the files that match `patterns`.

    later: patterns of what else will be needed of it, for the advice on what to download. ModelError if it is neither a
    folder nor on the hub.
    """
    folder, name = Path(repository), str(repository)
    if folder.is_dir():
        return folder
    if not hub.is_name(name):
        raise ModelError(f"CLIP model {name!r} is no folder here; put one there, or name one on the hub as OWNER/NAME")
    with hub.loading(f"CLIP model {name!r}", name, "its place", "", hub.only(*patterns, *later)):
        return Path(snapshot_download(name, allow_patterns=patterns))


def read_clip(repository: str | Path) -> CLIPModel:
    """The CLIPModel in float32 on the CPU; ModelError if it or some weights are missing, or if it is no CLIP."""
    config = read_config(repository)
    folder = fetch(repository, SAFETENSORS)
    if not any(folder.glob(SAFETENSORS[0])):
        folder = fetch(repository, PICKLED)
    tell_loading(f"the CLIP model {str(repository)!r}", folder.glob("*"))
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = CLIPModel.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ModelError(
            f"the weights of CLIP model {str(repository)!r} cannot be read: {one_line(error)}; "
            "give a folder that transformers' CLIPModel.save_pretrained wrote"
        ) from None
    clip, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"CLIP model {str(repository)!r} lacks {len(missing)} weights such as {missing[0]}; give a whole CLIPModel"
        )
    return clip


def read_config(repository: str | Path) -> CLIPConfig:
    """The CLIP's configuration; ModelError if it is missing or describes another kind of model."""
    values = _read_json(repository, "config.json", later=SAFETENSORS)
    if values.get("model_type") != "clip":
        found = f"is a {values.get('model_type')!r} model" if values else "has no config.json"
        raise ModelError(f"{str(repository)!r} {found}; a CLIP model is needed, such as yuvalkirstain/PickScore_v1")
    return CLIPConfig.from_dict(values)


def read_processor(
    repository: str | Path, processor: str | Path | None = None, *, mode: Mode = "antialias"
) -> tuple[CLIPConfig, CLIPTokenizer, Preprocessing]:
    """A CLIP's configuration, tokenizer and preprocessing; ModelError if one is missing or does not fit.

    processor: the repository of the tokenizer and of the mean and std (by default CLIP's usual ones), if `repository`
    has none.
    """
    config, source = read_config(repository), processor or repository
    tokenizer = read_tokenizer(source, config)
    vision: Any = config.vision_config
    mean, std = _normalisation(source)
    return config, tokenizer, Preprocessing(size=vision.image_size, mean=mean, std=std, mode=mode)


def _normalisation(repository: str | Path) -> tuple[Channels, Channels]:
    """Mean and std of the pixels, CLIP's usual ones where the repository has none.

    transformers 5 writes them into processor_config.json, older versions into preprocessor_config.json.
    """
    values = _read_json(repository, "preprocessor_config.json")
    newer = _read_json(repository, "processor_config.json").get("image_processor")
    values = values or (newer if isinstance(newer, dict) else {})
    mean = _channels(repository, "image_mean", values.get("image_mean", OPENAI_CLIP_MEAN))
    std = _channels(repository, "image_std", values.get("image_std", OPENAI_CLIP_STD))
    if not all(std):
        raise ModelError(f"image_std of {str(repository)!r} is {list(std)}; it must not be 0")
    return mean, std


def _channels(repository: str | Path, name: str, value: object) -> Channels:
    """Three finite numbers; one number counts for all channels."""
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or not all(isinstance(each, int | float) and math.isfinite(each) for each in values):
        raise ModelError(f"{name} of {str(repository)!r} is {one_line(value, 80)}; it should be one number or three")
    return tuple(map(float, values))


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str], config: CLIPConfig) -> Tensor:
    """Token ids (b, length), padded; a prompt longer than the text tower's context is cut."""
    text: Any = config.text_config
    options = {"truncation": True, "max_length": text.max_position_embeddings, "return_tensors": "pt"}
    return tokenizer(list(prompts), padding="max_length", **options).input_ids


def read_tokenizer(repository: str | Path, config: CLIPConfig) -> CLIPTokenizer:
    """The tokenizer; ModelError if it is missing or does not fit the text tower of `config`.

    Without its files transformers would make an empty tokenizer, to which all prompts are equal.
    """
    folder = fetch(repository, SMALL_FILES)
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ModelError(
            f"{str(repository)!r} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); name a repository "
            "that has one as the processor, for PickScore laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the tokenizer of {str(repository)!r} cannot be read: {one_line(error)}") from None
    text: Any = config.text_config
    if len(tokenizer) > text.vocab_size or text.eos_token_id not in (2, tokenizer.eos_token_id):  # 2: older files
        raise ModelError(
            f"the tokenizer of {str(repository)!r} has {len(tokenizer)} tokens and ends a text with "
            f"{tokenizer.eos_token_id}, but the CLIP has {text.vocab_size} and {text.eos_token_id}; name the CLIP's own"
        )
    return tokenizer


def _read_json(repository: str | Path, name: str, *, later: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a repository's JSON file; none if it is missing."""
    path = fetch(repository, SMALL_FILES, later=later) / name
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{name} of {str(repository)!r} is no valid JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{name} of {str(repository)!r} holds a {type(values).__name__}; it should hold keys")
    return values
