"""The disk space that the stages of a profile need, and what they use already."""

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spo.config import AlignConfig, Config
from spo.errors import DataError
from spo.runtime.files import read_json
from spo.workspace import Workspace

PNG, RAW = 1.5, 3  # bytes of a pixel; the evaluation's cache keeps raw pictures
STATES = 2  # of a training on disk at once


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes of a stage: its outputs (kept), its temporary files (passing), and what exists of both (there)."""

    kept: float
    passing: float
    there: float


def room(config: Config, root: Path, *, copies: int = 2, states: int = STATES) -> dict[str, DiskEstimate]:
    """Estimates by stage, in running order; weights are counted from the models' shapes.

    Pictures of a data set on the hub are not counted, since their sizes are unknown.

    copies: of each output that DVC caches; it copies the files if the file system cannot share them
    states: of a training, each with the weights and AdamW's moments
    """
    from spo.commands.architectures import latent_size, preference_weights  # slow to import, and every command would
    from spo.evaluation.model_variants import OTHERS_PROMPTS

    preferences, evaluate = config.prepare.preferences, config.evaluate
    seeds, pixels = len(config.training_seeds), math.prod(config.model.size)
    pairs, all_pairs = num_pairs(config, root) or 0, num_pairs(config, root, limit=False)
    source = size_of(root / preferences.source) if preferences else 0
    if preferences and preferences.max_pairs:
        source = round(source * pairs / all_pairs) if all_pairs else 0
    number = 4 if config.model.dtype == "float32" else 2  # bytes of a number of the latents
    latents = 2 * pairs * number * math.prod(latent_size(config.model))  # less if pairs share pictures
    models = [config.preference_models[name] for name in config.train_preference]
    weights = [preference_weights(config.model, model) for model in models]
    trainings = [
        states * count * (4 + moments(model.eight_bit))
        for model, count in zip(models, weights, strict=True)
        if not model.is_trained
    ]
    aligned = {name: trained_weights(config, config.align[name]) for name in config.methods}
    outputs = {name: 4 * aligned[name] * config.align[name].checkpoints for name in aligned}
    alignments = [
        states * aligned[name] * (4 + moments(config.align[name].optimizer.eight_bit)) + outputs[name]
        for name in aligned  # its checkpoints are copied as they become the output
    ]
    columns = 2 + len(config.methods) * seeds + len(evaluate.published)
    pictures = evaluate.num_prompts * evaluate.images_per_prompt * columns * pixels  # of the deciding sampler
    others = (len(evaluate.samplers) - 1) * pixels
    few = others * min(OTHERS_PROMPTS, evaluate.num_prompts) * columns
    raw = pictures + few + others * evaluate.num_prompts * evaluate.images_per_prompt  # base: all
    kept_and_passing = {
        "prepare": (copies * source, 0),
        "train_preference": (copies * 4 * sum(weights) + latents, max(trainings, default=0)),
        "align": (copies * seeds * sum(outputs.values()), max(alignments, default=0)),
        "evaluate": (copies * PNG * (pictures + few) + RAW * raw + copies * 4 * sum(aligned.values()), 0),
    }
    workspace = Workspace(config, root)
    models_made = workspace.output("preference_models")
    more = {"train_preference": [models_made, workspace.latents_cache], "evaluate": [workspace.evaluation_cache]}
    estimates = {}
    for stage, bytes_ in kept_and_passing.items():
        places = [workspace.output(stage), workspace.state(stage), *more.get(stage, [])]
        estimates[stage] = DiskEstimate(*bytes_, sum(map(size_of, places)))
    return estimates


def trained_weights(config: Config, method: AlignConfig) -> int:
    """The number of weights that a method trains, and a checkpoint has: the LoRA's, or all of the network."""
    from spo.commands.architectures import lora_weights, network_of, weights

    network = network_of(config.model)
    return weights(network) if method.full_fine_tuning else lora_weights(network, method.lora)


def num_pairs(config: Config, root: Path, *, limit: bool = True) -> float | None:
    """The approximate number of training pairs; None if they are not downloaded or a file is broken.

    limit: at most `max_pairs`, if the profile has that.
    """
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
    used = min(counted, (limit and preferences.max_pairs) or math.inf)
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


def moments(eight_bit: bool) -> int:
    """Bytes of AdamW's two moments of a weight."""
    return 2 if eight_bit else 8


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
