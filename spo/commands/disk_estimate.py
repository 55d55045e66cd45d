"""The disk space that the stages of a profile need, and what they use already."""

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spo.config import Config, PixelPreferenceConfig, PreferenceConfig
from spo.errors import DataError
from spo.runtime.files import read_json
from spo.workspace import Workspace

CLIP_BYTES = 4 * 986 * 10**6  # CLIP-H's weights in float32, if it is on the hub
MILLIONS = {"sd15": 860, "sdxl": 2567, "sd3": 8057, "flux": 11901}  # of weights, if the base is on the hub; SD3.5 large
TEXT_MILLIONS = {"sd15": 123, "sdxl": 818}  # of the text encoders of what a latent preference model starts from
CHANNELS = {"sd15": 4, "sdxl": 4, "sd3": 16, "flux": 16}  # of an encoded picture, whose sides are an eighth
PICTURE_BYTES = 2 + 3  # of a pixel: as a PNG, and raw until `evaluate` has ended
STATES = 6  # times the weights: two states, each of weights and two moments


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes of a stage: its outputs (kept), its temporary files (passing), and what exists of both (there)."""

    kept: float
    passing: float
    there: float


def room(config: Config, root: Path) -> dict[str, DiskEstimate]:
    """Estimates by stage, in running order. A LoRA's states and checkpoints are small and not counted.

    Files in DVC's cache count twice, since it copies them if the file system cannot share them.
    """
    preferences, evaluate = config.prepare.preferences, config.evaluate
    seeds, pixels = len(config.training_seeds), math.prod(config.model.size)
    source = size_of(root / preferences.source) if preferences and not preferences.max_pairs else 0
    models = [config.preference_models[name] for name in config.train_preference]
    trained = [0 if model.is_trained else _preference(config, model) for model in models]
    latents = 2 * (num_pairs(config, root) or 0) * pixels / 8**2 * 4 * CHANNELS[config.model.family]
    whole = [config.align[name].checkpoints for name in config.methods if config.align[name].full_fine_tuning]
    network = _network(config) if whole else 0
    columns = 2 + len(config.methods) * seeds + len(evaluate.published)
    pictures = evaluate.num_prompts * evaluate.images_per_prompt * columns * pixels
    kept_and_passing = {
        "prepare": (2 * source, 0),
        "train_preference": (2 * sum(trained) + latents, STATES * max(trained)),
        # the checkpoints of one training are copied as they become the output
        "align": (2 * network * sum(whole) * seeds, (STATES + max(whole, default=0)) * network),
        "evaluate": (pictures * PICTURE_BYTES, 0),
    }
    workspace = Workspace(config, root)
    models_made = workspace.output("preference_models")
    more = {"train_preference": [models_made, workspace.latents_cache], "evaluate": [workspace.evaluation_cache]}
    estimates = {}
    for stage, bytes_ in kept_and_passing.items():
        places = [workspace.output(stage), workspace.state(stage), *more.get(stage, [])]
        estimates[stage] = DiskEstimate(*bytes_, sum(map(size_of, places)))
    return estimates


def num_pairs(config: Config, root: Path) -> float | None:
    """The approximate number of training pairs; None if they are not downloaded or a file is broken."""
    from pyarrow import ArrowException  # slow to import, and every command would

    preferences = config.prepare.preferences
    if preferences is None:
        return None
    if preferences.source.startswith("hub:"):
        counted = math.inf
    else:
        from spo.data.preference_files import preference_files

        try:
            counted = sum(map(_num_rows, preference_files(root / preferences.source, preferences.split)[0]))
        except (OSError, ValueError, DataError, ArrowException):
            return None
    used = min(counted, preferences.max_pairs or math.inf)
    return None if used == math.inf else used * (1 - config.prepare.validation_fraction - config.prepare.test_fraction)


def size_of(place: Path) -> int:
    """Bytes of a file, or of all files below a folder; a missing or vanishing file counts 0."""
    if place.is_file():
        return place.stat().st_size
    found = 0
    for folder, _, names in os.walk(place):
        for name in names:
            with suppress(OSError):
                found += Path(folder, name).stat().st_size
    return found


def _preference(config: Config, training: PreferenceConfig) -> int:
    """Bytes of the preference model that trains, in float32.

    A latent one has half the UNet and the text encoders, or three quarters of a transformer.
    """
    if isinstance(training, PixelPreferenceConfig):
        start = Path(training.start_from)
        return size_of(start) if start.is_dir() else CLIP_BYTES
    if config.model.is_flow:
        return 3 * _network(config) // 4
    text = sum(_part(config, name) for name in ("text_encoder", "text_encoder_2"))
    return _network(config) // 2 + (text or 4 * 10**6 * TEXT_MILLIONS[config.model.family])


def _network(config: Config) -> int:
    """Bytes of the denoising network in float32, its dtype in training."""
    name = "transformer" if config.model.is_flow else "unet"
    return _part(config, name) or 4 * 10**6 * MILLIONS[config.model.family]


def _part(config: Config, name: str) -> int:
    """Bytes of a part of the base in float32; 0 if the base is no folder here, or has no such part."""
    return size_of(Path(config.model.path) / name) * (1 if config.model.dtype == "float32" else 2)


def _num_rows(file: Path) -> int:
    if file.suffix.lower() == ".parquet":
        from pyarrow.parquet import read_metadata

        return read_metadata(file).num_rows
    if file.suffix.lower() == ".jsonl":
        with file.open("rb") as lines:
            return sum(1 for _ in lines)
    if file.suffix.lower() == ".json":
        return len(read_json(file))
    from pyarrow import ipc, memory_map

    with memory_map(str(file)) as opened, ipc.open_stream(opened) as batches:
        return sum(len(batch) for batch in batches)
