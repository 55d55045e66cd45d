"""The inputs of the report: the small files that the other stages write under runs/<profile>/."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.config import Config
from spo.errors import DataError
from spo.workspace import Workspace

Row = dict[str, Any]
OfSeeds = dict[int, list[Row]]  # by training seed
TEXT = ("sampler", "column", "against", "metric", "model", "prompt", "checkpoint")  # every other column is numbers


@dataclass(frozen=True)
class PreferenceModel:
    """What `train_preference` measured of a preference model."""

    metrics: dict[str, Any]
    accuracy: list[Row]  # agreement with held-out labels; empty if not measured
    candidates: list[Row]  # agreement with a metric on candidates of one x_t; empty if not measured

    @property
    def cost(self) -> dict[str, float]:
        """Seconds and unet_forwards of its training."""
        return {name: self.metrics[name] for name in ("unet_forwards", "seconds") if name in self.metrics}


def total_cost(costs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums of costs, of what all of them name."""
    found = list(costs)
    shared = [name for name in found[0] if all(name in cost for cost in found)] if found else []
    return {name: sum(cost[name] for cost in found) for name in shared}


@dataclass(frozen=True)
class Inputs:
    evaluation: dict[str, Any]  # metrics.json of evaluate
    means: list[Row]  # of each sampler, column and metric
    comparisons: list[Row]  # of each sampler, pair of columns and metric
    scores: list[Row]  # of each image
    validation: list[Row]  # of each checkpoint
    validation_scores: list[Row]  # of each checkpoint and prompt
    history: dict[str, OfSeeds]  # by method: of each update
    timesteps: dict[str, OfSeeds]  # by method, if it has them
    watch: dict[str, OfSeeds]  # by method, if it was watched: of each look
    training: dict[str, list[dict[str, Any]]]  # metrics.json of each method's training seeds
    preference_models: dict[str, PreferenceModel]
    seconds: dict[str, float]  # of each stage, in the order of the pipeline
    samples: Path  # the sheet of samples
    images: Path  # of the deciding sampler
    other_samplers: dict[str, Path]  # images of a few prompts


def read_inputs(config: Config, root: Path) -> Inputs:
    """Read the files; DataError with the stage to run if one is missing or broken."""
    workspace = Workspace(config, root)
    evaluate = workspace.evaluate
    prepare = read_json(workspace.prepared.folder / "metrics.json", "prepare")
    preference_models = {
        name: _preference_model(workspace.train_preference(name), f"train_preference {name}")
        for name in config.train_preference
    }
    training = {
        name: [
            read_json(workspace.aligned(name, seed) / "metrics.json", f"align {name} --seed {seed}")
            for seed in config.training_seeds
        ]
        for name in config.methods
    }
    evaluation = read_json(evaluate / "metrics.json", "evaluate")
    stages = {"prepare": [prepare]}
    stages |= {f"train_preference {name}": [model.metrics] for name, model in preference_models.items()}
    for name, seeds in training.items():
        stages[f"align {name}" + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else "")] = seeds
    stages["evaluate"] = [evaluation]
    figures = ("sampler", "column", "metric", "low", "high")
    checkpoint = ("column", "training_seed", "checkpoint")
    images = ("column", "training_seed", "sampler", "prompt_index", "image_index", "prompt")
    return Inputs(
        evaluation=evaluation,
        means=read_csv(evaluate / "means.csv", "evaluate", (*figures, "mean")),
        comparisons=read_csv(evaluate / "comparisons.csv", "evaluate", (*figures, "against", "difference", "win_rate")),
        scores=read_csv(evaluate / "scores.csv", "evaluate", images),
        validation=read_csv(evaluate / "validation.csv", "evaluate", checkpoint),
        validation_scores=read_csv(evaluate / "validation_scores.csv", "evaluate", (*checkpoint, "prompt_index")),
        history=_of_methods(config, root, "history.csv", ("loss",)),
        timesteps=_of_methods(config, root, "timesteps.csv", ("timestep", "branched", "kept", "margin"), optional=True),
        watch=_of_methods(config, root, "watch.csv", ("unet_forwards", "gap"), optional=True),
        training=training,
        preference_models=preference_models,
        seconds={
            stage: sum(metrics["seconds"] for metrics in parts)
            for stage, parts in stages.items()
            if all("seconds" in metrics for metrics in parts)
        },
        samples=evaluate / "samples.png",
        images=evaluate / "images",
        other_samplers={
            name: folder for name in config.evaluate.samplers if (folder := evaluate / "other_samplers" / name).is_dir()
        },
    )


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """A stage's metrics; DataError if the file is missing or no JSON object."""
    text = _read_text(path, stage)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no valid JSON ({error}); run `python -m spo {stage}` again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, not an object; run `python -m spo {stage}` again")
    return value


def read_csv(path: Path, stage: str, columns: tuple[str, ...]) -> list[Row]:
    """Rows with numbers as floats and empty cells as nan; DataError if one of `columns` or a number is missing."""
    text = _read_text(path, stage)
    if not text.strip():  # how a table without rows is written
        return []
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; run `python -m spo {stage}` again")
    try:
        return [{key: value if key in TEXT else float(value or "nan") for key, value in row.items()} for row in reader]
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} line {reader.line_num}: {error}; run `python -m spo {stage}` again") from None


def _preference_model(folder: Path, stage: str) -> PreferenceModel:
    tables = {"accuracy.csv": "accuracy", "candidates.csv": "agreement"}
    accuracy, candidates = (
        read_csv(folder / name, stage, ("timestep", column)) if (folder / name).exists() else []
        for name, column in tables.items()
    )
    return PreferenceModel(read_json(folder / "metrics.json", stage), accuracy, candidates)


def _of_methods(
    config: Config, root: Path, name: str, columns: tuple[str, ...], *, optional: bool = False
) -> dict[str, OfSeeds]:
    """A table of every training; an optional table may be missing."""
    found: dict[str, OfSeeds] = {}
    for method in config.methods:
        for seed in config.training_seeds:
            path = Workspace(config, root).aligned(method, seed) / name
            if path.exists() or not optional:
                rows = read_csv(path, f"align {method} --seed {seed}", columns)
                found.setdefault(method, {})[seed] = rows
    return found


def _read_text(path: Path, stage: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} is missing; run `python -m spo {stage}` first") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text; run `python -m spo {stage}` again") from None
