"""Preference models on disk: our folders, the published files, and plain CLIPs to start from.

Our folder holds config.json (the format's name, the CLIP's configuration, the preprocessing), model.safetensors and
the tokenizer. The published code writes only a pickled state dict.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from spo.core.precision import all_finite
from spo.errors import ModelError, one_line
from spo.preference.pixel import StepAwareCLIP
from spo.preference.preprocess import Mode, Preprocessing
from spo.preference.repository import read_clip, read_processor, read_tokenizer
from spo.runtime.files import atomic_path, write_json
from spo.runtime.progress import tell_loading

FORMAT = "spo step-aware preference model"
VERSION = 1
MAKE_ONE = "make one with the train_preference stage or with import-preference-model"


@dataclass(frozen=True)
class PreferenceModel:
    """A preference model with its tokenizer and preprocessing."""

    model: StepAwareCLIP
    tokenizer: CLIPTokenizer
    preprocess: Preprocessing


def load_clip(
    repository: str | Path,
    *,
    processor: str | Path | None = None,
    preprocessing: Mode = "antialias",
    generator: Generator | None = None,
) -> PreferenceModel:
    """A plain CLIP (hub name or folder) as the step-aware model that equals it for every t, float32 on the CPU.

    `processor` has the tokenizer and the mean and std if `repository` has none: PickScore's are
    yuvalkirstain/PickScore_v1 and laion/CLIP-ViT-H-14-laion2B-s32B-b79K. `generator` as in StepAwareCLIP.from_clip.
    ModelError if something is missing or does not fit.
    """
    _, tokenizer, preprocess = read_processor(repository, processor, mode=preprocessing)
    model = StepAwareCLIP.from_clip(read_clip(repository), generator=generator)
    return PreferenceModel(model, tokenizer, preprocess)


def save_preference_model(
    model: StepAwareCLIP, tokenizer: CLIPTokenizer, preprocessing: Preprocessing, folder: str | Path
) -> None:
    """Write a folder for load_preference_model, atomically."""
    clip = json.loads(model.clip.config.to_json_string(use_diff=False))
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tokenizer.save_pretrained(temporary)
        write_model(model, {"preprocessing": asdict(preprocessing), "clip": clip}, temporary)


def write_model(model: nn.Module, settings: Mapping[str, Any], folder: Path) -> None:
    """Write a preference model's weights, and its settings with our format's mark, into an existing folder."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    write_json(folder / "config.json", {"format": FORMAT, "version": VERSION, **settings})


def fill_model(model: nn.Module, folder: Path) -> None:
    """Give a model the weights of such a folder, in float32; ModelError if they are damaged or do not fit."""
    try:
        weights = read_weights(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(folder, one_line(error)) from None
    if found := weight_problems({name: tensor.shape for name, tensor in model.state_dict().items()}, weights):
        raise damaged(folder, f"its model.safetensors {found}")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a preference model's folder, as the file has them."""
    file = folder / "model.safetensors"
    tell_loading(f"the preference model {folder}", [file])
    return load_file(file)


def damaged(folder: Path, problem: str) -> ModelError:
    return ModelError(f"{folder} is a damaged preference model: {problem}; {MAKE_ONE}")


def load_preference_model(folder: str | Path) -> PreferenceModel:
    """Read a folder of save_preference_model, in float32 on the CPU; ModelError if it cannot be read."""
    folder = Path(folder)
    values = read_settings(folder, kind="pixel")
    try:
        config = CLIPConfig.from_dict(values["clip"])
        pixels = values["preprocessing"]
        preprocess = Preprocessing(**{**pixels, "mean": tuple(pixels["mean"]), "std": tuple(pixels["std"])})
        weights = read_weights(folder)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder} is a damaged preference model: {one_line(error)}; {MAKE_ONE}") from None
    return PreferenceModel(_filled(config, weights, str(folder)), read_tokenizer(folder, config), preprocess)


def kind_of(folder: Path) -> str:
    """The kind of the preference model in a folder of ours; ModelError where there is none."""
    return _read_settings(folder).get("kind", "pixel")


def read_settings(folder: Path, *, kind: str) -> dict[str, Any]:
    """The config.json of a folder of ours; ModelError where there is none, or one of another kind or version."""
    values = _read_settings(folder)
    if (found := values.get("kind", "pixel")) != kind:
        raise ModelError(f"{folder} holds a preference model of kind {found!r}, not {kind!r}; {MAKE_ONE}")
    return values


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no preference model: {one_line(error)}; {MAKE_ONE}") from None
    if not isinstance(values, dict) or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise ModelError(f"{folder}/config.json is not that of a {FORMAT}, version {VERSION}; {MAKE_ONE}")
    return values


def read_published(file: str | Path, config: CLIPConfig) -> StepAwareCLIP:
    """The step-aware model of a published .bin, for a CLIP with the configuration `config`.

    Only tensors are unpickled. ModelError if the file is missing or damaged, holds anything but tensors, or if a
    weight is missing, unknown or of another shape.
    """
    try:
        tell_loading(f"the preference model {file}", [Path(file)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # an error follows if it matters
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist; give the path of a published preference model (.bin)") from None
    except Exception as error:  # torch's reader raises many kinds of errors for a damaged pickle
        raise ModelError(
            f"{file} cannot be read as a file of tensors alone, so nothing of it was run: {one_line(error, 120)}; "
            "download the published .bin again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{file} holds no state dict (names and tensors); give a published preference model (.bin)")
    ids = [name for name in state if str(name).endswith(".embeddings.position_ids")]  # of older transformers: 0, 1, ...
    weights = {name: value for name, value in state.items() if name not in ids}
    return _filled(config, weights, str(file), name_in_file=published_name)


def import_published(
    file: str | Path,
    repository: str | Path,
    folder: str | Path,
    *,
    processor: str | Path | None = None,
    preprocessing: Mode = "published",
) -> None:
    """Convert a published .bin to our folder; configuration and tokenizer come from the CLIP `repository`.

    The published files belong to laion/CLIP-ViT-H-14-laion2B-s32B-b79K, whose weights are not needed. `processor` as in
    load_clip. ModelError if the file or the repository cannot be read or they do not fit.
    """
    config, tokenizer, preprocess = read_processor(repository, processor, mode=preprocessing)
    save_preference_model(read_published(file, config), tokenizer, preprocess, folder)


def export_published(folder: str | Path, file: str | Path) -> None:
    """Convert our folder to the published code's .bin; ModelError if the folder cannot be read."""
    state = load_preference_model(folder).model.state_dict()
    with atomic_path(file) as temporary:
        torch.save({published_name(name): tensor for name, tensor in state.items()}, temporary)


def published_name(name: str) -> str:
    """The published code's name of a weight of StepAwareCLIP."""
    name = name.removeprefix("clip.")
    name = re.sub(r"^layer_modulation\.(\d+)\.", r"vision_model.encoder.layers.\1.adaLN_modulation.1.", name)
    name = re.sub(r"^final_modulation\.", "vision_model.adaLN_modulation.1.", name)
    return f"model.{name}"


def _usable(weight: Tensor) -> bool:
    return weight.layout == torch.strided and weight.is_floating_point() and all_finite(weight)


def _filled(
    config: CLIPConfig, weights: Mapping[str, Tensor], source: str, *, name_in_file: Callable[[str], str] = str
) -> StepAwareCLIP:
    """A new model with `weights`, which must be exactly its own in name and shape."""
    with init_empty_weights():  # on the meta device: random weights would take minutes, and the memory twice
        model = StepAwareCLIP(CLIPModel(config))
    shapes = {name_in_file(name): tensor.shape for name, tensor in model.state_dict().items()}
    if found := weight_problems(shapes, weights):
        raise ModelError(f"{source} does not fit its CLIP configuration: it {found}; name the CLIP it is of")
    model.load_state_dict({name: weights[name_in_file(name)].float() for name in model.state_dict()}, assign=True)
    return model.eval()


def weight_problems(shapes: Mapping[str, torch.Size], weights: Mapping[str, Any]) -> str:
    """What keeps `weights` from being exactly those of a model with `shapes`, in a few words; "" for nothing."""
    problems = {
        "lacks": [name for name in shapes if name not in weights],
        "has the unknown": [name for name in weights if name not in shapes],
        "has another shape of": [name for name in shapes if name in weights and weights[name].shape != shapes[name]],
        "has no usable numbers in": [name for name in shapes if name in weights and not _usable(weights[name])],
    }
    return ", ".join(
        f"{what} {one_line(names[0], 100)} (one of {len(names)})" for what, names in problems.items() if names
    )
