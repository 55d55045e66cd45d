"""Shared code of the experiments: runs of stages in their own folder, and gains over the base with intervals.

An experiment calls the pipeline's stages with a changed configuration under `.cache/bench`, so it changes no files of
DVC. Finished parts are not repeated.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spo.config import Config
from spo.errors import DataError
from spo.evaluation.checkpoint_selection import choose_checkpoint
from spo.evaluation.image_scorer import ImageScorer
from spo.evaluation.model_variants import ModelVariant, tasks
from spo.evaluation.statistics import Difference, paired_difference
from spo.metrics.metric import Scores
from spo.runtime.files import atomic_path
from spo.workspace import Workspace

SPLITS = ("validation", "test")
QUICK = {"num_prompts": 4, "num_validation_prompts": 4, "bootstrap_samples": 200}


def work_folder(name: str, config: Config, more: Mapping[str, Any], *, root: Path) -> Path:
    """The experiment's folder; its name depends on the settings, the base and the prepared data."""
    settings = {**config.model_dump(mode="json", exclude={"methods", "training_seeds"}), **more}
    inputs = [Path(config.model.path), Workspace(config, root).prepared.folder]
    text = json.dumps([settings, [digest(path) for path in inputs]], sort_keys=True)
    return root / ".cache" / "bench" / name / f"{config.profile}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def digest(path: Path) -> str:
    """A hash of all files in a folder except metrics.json, which has times; of nothing for a hub name."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != "metrics.json":
            found.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return found.hexdigest()[:10]


def copy_outputs(stage: str, config: Config, *, source: Path, target: Path) -> None:
    """Copy a stage's outputs to the experiment, once; DataError if the stage has not run."""
    original, copy = Workspace(config, source).output(stage), Workspace(config, target).output(stage)
    if not original.is_dir():
        raise DataError(f"{original} is missing; run `python -m spo repro` first")
    if not copy.exists():
        with atomic_path(copy) as temporary:
            shutil.copytree(original, temporary)


class CheckpointScorer:
    """Scores the base and checkpoints like `evaluate`, with one image for each prompt and the deciding sampler.

    Finished scores are cached in `root`, under `.cache`.
    """

    def __init__(self, config: Config, root: Path):
        self.config = config.evaluate
        counts = (self.config.num_validation_prompts, self.config.num_prompts)
        self.tasks = {
            split: tasks(Workspace(config, root).prepared, split, count, 1, self.config.seed)
            for split, count in zip(SPLITS, counts, strict=True)
        }
        self.image_scorer = ImageScorer(config, root)

    def scores(self, name: str, checkpoint: Path | None, split: str) -> Scores:
        """Scores (n,) by name, of the base if there is no checkpoint."""
        variant = ModelVariant(name, checkpoint=checkpoint)
        return self.image_scorer.scores(variant, self.tasks[split], self.config.deciding, split=split)

    def differences(self, scores: Scores, other: Scores, split: str) -> dict[str, Difference]:
        """`scores` minus `other`, by name, with 95% intervals over prompts."""
        samples, prompts = self.config.bootstrap_samples, [task.prompt for task in self.tasks[split]]
        return {
            key: paired_difference(values.numpy(), other[key].numpy(), prompts, samples=samples)
            for key, values in scores.items()
        }

    def choose(self, name: str, candidates: Sequence[Path]) -> Path:
        """The checkpoint of a training that the pipeline's rule chooses on the validation prompts."""
        means = [means_of(self.scores(f"{name}-{each.name}", each, "validation")) for each in candidates]
        best = choose_checkpoint(
            means,
            means_of(self.scores("base", None, "validation")),
            primary=self.config.primary,
            guarded=self.config.guarded,
            tolerance=self.config.guard_tolerance,
        )
        return candidates[best]


def means_of(scores: Scores) -> dict[str, float]:
    return {name: values.mean().item() for name, values in scores.items()}


def cells(differences: Mapping[str, Difference], names: Sequence[str]) -> dict[str, Any]:
    """Columns <name>_<figure> of a table."""
    return {
        f"{name}_{figure}": value
        for name in names
        for figure, value in asdict(differences[name]).items()
        if figure not in ("ties", "n")
    }


SHORT = {"steps": 4, "evaluate_pairs": 16, "candidates": None}  # of the preference model


def shortened(config: Config) -> Config:
    """The configuration with as little work as possible, to test that an experiment runs."""
    settings = {name: each.model_copy(update={"epochs": 1, "checkpoints": 2}) for name, each in config.align.items()}
    preference = {**config.preference_models, "pixel": config.preference_models["pixel"].model_copy(update=SHORT)}
    evaluate = config.evaluate.model_copy(update=QUICK)
    return config.model_copy(update={"align": settings, "preference_models": preference, "evaluate": evaluate})
