"""What the report is made from: the small files that the other stages leave under runs/<profile>/."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.config import Config
from spo.errors import DataError

Row = dict[str, Any]
TEXT = ("column", "model", "prompt", "checkpoint")  # every other column is numbers


@dataclass(frozen=True)
class Inputs:
    evaluation: dict[str, Any]
    scores: list[Row]  # an image each
    validation: list[Row]  # a checkpoint each
    history: dict[str, list[Row]]  # of each method: an update each
    timesteps: dict[str, list[Row]]  # of each method that has them
    accuracy: list[Row]  # of the preference model; empty where it was not measured
    stages: dict[str, dict[str, Any]]  # metrics of each stage, in the order of the pipeline
    images: Path


def read_inputs(config: Config, root: Path) -> Inputs:
    """Read what the stages left; DataError naming the stage to run where something is missing or broken."""
    evaluate = root / config.folder("evaluate")
    preference = root / config.folder("train_preference")
    align = {name: root / config.aligned(name, config.training_seeds[0]) for name in config.methods}
    stages = {
        "prepare": read_json(root / config.folder("prepare") / "metrics.json", "prepare"),
        "train_preference": read_json(preference / "metrics.json", "train_preference"),
        **{f"align {name}": read_json(folder / "metrics.json", f"align {name}") for name, folder in align.items()},
        "evaluate": read_json(evaluate / "metrics.json", "evaluate"),
    }
    return Inputs(
        evaluation=stages["evaluate"],
        scores=read_csv(
            evaluate / "scores.csv", "evaluate", ("column", "eta", "prompt_index", "image_index", "prompt")
        ),
        validation=read_csv(evaluate / "validation.csv", "evaluate", ("column", "checkpoint", "unet_forwards")),
        history={name: read_csv(folder / "history.csv", f"align {name}", ("loss",)) for name, folder in align.items()},
        timesteps={
            name: read_csv(folder / "timesteps.csv", f"align {name}", ("timestep", "branched", "kept", "margin"))
            for name, folder in align.items()
            if (folder / "timesteps.csv").exists()  # only methods that branch have one
        },
        accuracy=read_csv(preference / "accuracy.csv", "train_preference", ("timestep", "model", "accuracy"))
        if (preference / "accuracy.csv").exists()
        else [],
        stages=stages,
        images=evaluate / "images",
    )


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """A stage's metrics; DataError where the file is missing or no JSON object."""
    text = _read_text(path, stage)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no valid JSON ({error}); run `python -m spo {stage}` again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, not an object; run `python -m spo {stage}` again")
    return value


def read_csv(path: Path, stage: str, columns: tuple[str, ...]) -> list[Row]:
    """Rows with numbers as floats, an empty cell as nan; DataError where one of `columns` or a number is missing."""
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


def _read_text(path: Path, stage: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} is missing; run `python -m spo {stage}` first") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text; run `python -m spo {stage}` again") from None
