"""What the experiments share: runs of stages in a folder of their own, and gains over the base with intervals.

An experiment calls the pipeline's stages as they are, on a changed configuration and under `.cache/bench`, so that it
touches nothing that DVC knows. Whatever is finished there is not done again.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.config import Config
from spo.device import best_device
from spo.errors import DataError
from spo.evaluation.choice import choose_checkpoint
from spo.evaluation.generate import eight_bits, generate, image_seed
from spo.evaluation.metrics import Scores, build_metrics, score
from spo.evaluation.statistics import Difference, paired_difference
from spo.files import atomic_path, read_json, write_json
from spo.models.load import build
from spo.models.policy import load_policy

SPLITS = ("validation", "test")
QUICK = {"num_prompts": 4, "num_validation_prompts": 4, "bootstrap_samples": 200}


def place(name: str, config: Config, more: Mapping[str, Any], *, root: Path) -> Path:
    """The experiment's folder: another one wherever the settings, the base or the prepared data are others."""
    settings = {**config.model_dump(mode="json", exclude={"methods", "training_seeds"}), **more}
    inputs = [Path(config.model.path), root / config.folder("prepare")]
    text = json.dumps([settings, [digest(path) for path in inputs]], sort_keys=True)
    return root / ".cache" / "bench" / name / f"{config.profile}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def digest(path: Path) -> str:
    """Of all that lies in a folder but its metrics, which tell times; a hub name, which is no folder, has none."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != "metrics.json":
            found.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return found.hexdigest()[:10]


def adopt(stage: str, config: Config, *, source: Path, target: Path) -> None:
    """Copy a stage's outputs to the experiment, once; DataError where the stage has not run."""
    folder = config.folder(stage)
    if not (source / folder).is_dir():
        raise DataError(f"{source / folder} is missing; run `python -m spo repro` first")
    if not (target / folder).exists():
        with atomic_path(target / folder) as temporary:
            shutil.copytree(source / folder, temporary)


def checkpoints(folder: Path) -> list[Path]:
    """Of an `align` run, in the order of training."""
    return sorted((folder / "checkpoints").glob("step-*"))


class Ruler:
    """Scores of the base and of checkpoints on a split's prompts, same seeds; kept in `folder`, a file each."""

    def __init__(self, config: Config, prepared: Path, folder: Path):
        self.config = config.evaluate
        self.folder = folder
        counts = (self.config.num_validation_prompts, self.config.num_prompts)
        self.prompts = {
            split: (prepared / "prompts" / f"{split}.txt").read_text(encoding="utf-8").splitlines()[:count]
            for split, count in zip(SPLITS, counts, strict=True)
        }
        device = best_device()
        self.model = build(config.model, config.sampling, device)
        needed = (self.config.primary, *self.config.guarded)
        self.judges = build_metrics(self.config.metrics, device, needed=needed)

    def scores(self, name: str, checkpoint: Path | None, split: str) -> Scores:
        """Scores (n,) by name; None is the base."""
        version = "" if checkpoint is None else f"-{digest(checkpoint)}"
        file = self.folder / split / f"{name}{version}.json"
        if not file.exists():
            images = self._images(checkpoint, split, f"{split}: {name}")
            found = score(self.judges, images, self.prompts[split])
            write_json(file, {key: values.tolist() for key, values in found.items()})
        return {key: torch.tensor(values) for key, values in read_json(file).items()}

    def _images(self, checkpoint: Path | None, split: str, label: str) -> Tensor:
        prompts, settings = self.prompts[split], self.config
        if checkpoint is not None:
            load_policy(self.model, checkpoint)

        def make() -> Tensor:
            return generate(
                self.model,
                prompts,
                [image_seed(settings.seed, prompt, 0) for prompt in prompts],
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                eta=settings.etas[0],
                batch_size=settings.batch_size,
                label=label,
            )

        if checkpoint is None:
            with self.model.reference():
                return eight_bits(make())
        return eight_bits(make())

    def differences(self, scores: Scores, other: Scores, split: str) -> dict[str, Difference]:
        """How far `scores` are above `other`, by name, with 95% intervals over prompts."""
        samples = self.config.bootstrap_samples
        return {
            key: paired_difference(values.numpy(), other[key].numpy(), self.prompts[split], samples=samples)
            for key, values in scores.items()
        }

    def choose(self, name: str, run: Path) -> Path:
        """The checkpoint of an `align` run that the pipeline's rule takes on the validation prompts."""
        candidates = checkpoints(run)
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


def quickened(config: Config) -> Config:
    """As little of everything as runs at all."""
    settings = {name: each.model_copy(update={"epochs": 1, "checkpoints": 2}) for name, each in config.align.items()}
    preference = config.train_preference.model_copy(update={"steps": 4, "evaluate_pairs": 16})
    evaluate = config.evaluate.model_copy(update=QUICK)
    return config.model_copy(update={"align": settings, "train_preference": preference, "evaluate": evaluate})
