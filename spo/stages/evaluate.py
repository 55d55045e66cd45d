"""Compare base and aligned models on the same held-out prompts, seeds and samplers.

Each training's checkpoint is chosen on the validation prompts by one rule; the scores reported are of the test
prompts. A control column shows what the best change of contrast alone makes of the base's images. What is finished is
kept in .cache/evaluate, so that an evaluation that was killed goes on where it was.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from spo.config import Config
from spo.evaluation.checkpoint_selection import choose_checkpoint
from spo.evaluation.image_scorer import ImageScorer, joined
from spo.evaluation.model_variants import BASE, CONTROL, ModelVariant, Task, checkpoints, tasks
from spo.evaluation.tables import Column, Row, compact, comparison_rows, mean_rows, score_rows
from spo.metrics.metric import Scores
from spo.models.generate import from_bytes
from spo.runtime import distributed
from spo.runtime.files import atomic_path, write_json
from spo.runtime.memory import memory_advice
from spo.runtime.pictures import plain_sheet, to_picture
from spo.runtime.tables import write_csv
from spo.tracking import Tracker
from spo.workspace import Workspace

SAMPLE_COLUMNS = 10
TABLES = ("means.csv", "comparisons.csv", "validation.csv", "validation_scores.csv", "scores.csv")


def run(config: Config, *, root: Path = Path(), tracker: Tracker) -> None:
    """Write images/, lora/, samples.png, metrics.json and five tables to runs/<profile>/evaluate.

    lora/<method> is, of the method's training seeds, the one that the rule prefers on the validation prompts.
    """
    start = time.perf_counter()
    evaluation = Evaluation(config, root)
    advice = f"lower evaluate.batch_size, now {config.evaluate.batch_size}"
    target = Workspace(config, root).evaluate
    output = distributed.written_by_main(atomic_path(target))
    with memory_advice(advice), output as folder:
        folder.mkdir()
        validation, chosen = evaluation.choose()
        columns, factor = evaluation.compare(chosen, folder / "images")
        metrics = evaluation.write_tables(folder, columns, validation, chosen)
        for name, subject in evaluation.release(validation, chosen).items():
            assert subject.checkpoint is not None  # it was chosen among a training's
            shutil.copytree(subject.checkpoint, folder / "lora" / name)
            metrics[name]["released"] = f"seed-{subject.training_seed}/{subject.checkpoint.name}"
        metrics[CONTROL]["factor"] = factor
        metrics["seconds"] = round(time.perf_counter() - start, 1)
        write_json(folder / "metrics.json", metrics)
        samples = plain_sheet([_first_pictures(folder / "images" / name) for name in (BASE, *config.methods)])
        samples.save(folder / "samples.png")
    if distributed.is_main():
        evaluation.studio.shelf.tidy()
        _report(tracker, target, metrics, samples, validation)


class Evaluation:
    """The images to be made, and who makes and judges them."""

    def __init__(self, config: Config, root: Path):
        self.settings = config.evaluate
        prepared, settings, seed = Workspace(config, root).prepared, config.evaluate, config.evaluate.seed
        self.validation = tasks(prepared, "validation", settings.num_validation_prompts, 1, seed)
        self.test = tasks(prepared, "test", settings.num_prompts, settings.images_per_prompt, seed)
        self.trainings = {
            (name, training_seed): checkpoints(config, name, training_seed, root)
            for name in config.methods
            for training_seed in config.training_seeds
        }
        self.validation_scores: list[Row] = []  # an image each, in the metrics that choose
        self.others = [ModelVariant(name, borrowed=lora) for name, lora in self.settings.loras.items()]
        self.studio = ImageScorer(config, root)

    def choose(self) -> tuple[list[Row], dict[tuple[str, int], ModelVariant]]:
        """Score every checkpoint on the validation prompts: a row each, and the choice of each training."""
        rows = [self._validation_row(ModelVariant(BASE))]
        chosen = {}
        for training, candidates in self.trainings.items():
            found = [self._validation_row(subject) for subject in candidates]
            best = self._best(found, rows[0])
            found[best]["chosen"] = 1
            chosen[training] = candidates[best]
            rows += found
        return rows, chosen

    def release(
        self, validation: Sequence[Row], chosen: dict[tuple[str, int], ModelVariant]
    ) -> dict[str, ModelVariant]:
        """Of each method's choices the one to be used, by the same rule on the same prompts."""
        base, *rows = validation
        released = {}
        for name in dict.fromkeys(method for method, _ in chosen):
            subjects = [subject for (method, _), subject in chosen.items() if method == name]
            released[name] = subjects[self._best([r for r in rows if r["column"] == name and r["chosen"]], base)]
        return released

    def compare(self, chosen: dict[tuple[str, int], ModelVariant], folder: Path) -> tuple[list[Column], float]:
        """Base, control, every training's choice and others' LoRAs on the test prompts.

        The deciding sampler's images go to `folder`.

        Returns the columns, sampler by sampler, and the control's factor of contrast under the deciding one.
        """
        columns: list[Column] = []
        factors: list[float] = []
        for eta in self.settings.etas:
            keep = folder if eta == self.settings.etas[0] else None
            columns += self._untrained(eta, keep, factors)
            for name in dict.fromkeys(method for method, _ in chosen):
                of_method = {seed: subject for (method, seed), subject in chosen.items() if method == name}
                scores = [self._judged(subject, eta, keep) for subject in of_method.values()]
                columns.append(Column(name, eta, tuple(of_method), _stacked(scores)))
            columns += [Column(s.column, eta, (None,), _stacked([self._judged(s, eta, keep)])) for s in self.others]
        return columns, factors[0]

    def write_tables(
        self, folder: Path, columns: Sequence[Column], validation: Sequence[Row], chosen: dict[Any, ModelVariant]
    ) -> dict[str, Any]:
        """Write the tables; the figures of the verdict."""
        prompts, samples = [task.prompt for task in self.test], self.settings.bootstrap_samples
        means = mean_rows(columns, prompts, samples=samples)
        comparisons = comparison_rows(columns, prompts, samples=samples)
        tables = (means, comparisons, validation, self.validation_scores, score_rows(columns, self.test))
        for name, rows in zip(TABLES, tables, strict=True):
            write_csv(folder / name, rows)
        settings = self.settings
        seeds = len({seed for _, seed in chosen})
        counts = {"prompts": len(set(prompts)), "images": len(prompts), "training_seeds": seeds}
        figures = compact(means, comparisons, primary=settings.primary, guarded=settings.guarded, eta=settings.etas[0])
        return {**counts, **figures}

    def _untrained(self, eta: float, folder: Path | None, factors: list[float]) -> list[Column]:
        base = ModelVariant(BASE)
        batches = list(self.studio.batches(base, self.test, eta, split="test", images=True))
        factor, control = self.studio.best_contrast(batches)
        factors.append(factor)
        if folder is not None:
            for batch in batches:
                pictures = from_bytes(batch.images)
                save_images(pictures, batch.tasks, folder / BASE)
                save_images(self.studio.with_contrast(pictures, factor), batch.tasks, folder / CONTROL)
        own = joined([batch.scores for batch in batches])
        return [Column(name, eta, (None,), _stacked([scores])) for name, scores in ((BASE, own), (CONTROL, control))]

    def _judged(self, subject: ModelVariant, eta: float, folder: Path | None) -> Scores:
        scores = []
        for batch in self.studio.batches(subject, self.test, eta, split="test", images=folder is not None):
            scores.append(batch.scores)
            if folder is not None:
                save_images(from_bytes(batch.images), batch.tasks, folder / subject.place)
        return joined(scores)

    def _validation_row(self, subject: ModelVariant) -> Row:
        eta = self.settings.etas[0]
        scores = self.studio.scores(subject, self.validation, eta, split="validation")
        names = {
            "column": subject.column,
            "training_seed": "" if subject.training_seed is None else subject.training_seed,
            "checkpoint": BASE if subject.checkpoint is None else subject.checkpoint.name,
        }
        self.validation_scores += [
            {**names, "prompt_index": task.prompt_index}
            | {name: scores[name][i].item() for name in (self.settings.primary, *self.settings.guarded)}
            for i, task in enumerate(self.validation)
        ]
        return {
            **names,
            **subject.cost(),
            "chosen": 0,
            "primary": scores[self.settings.primary].mean().item(),  # under one name in every profile, for dvc's plot
            **{name: values.mean().item() for name, values in scores.items()},
        }

    def _best(self, candidates: Sequence[Row], base: Row) -> int:
        settings = self.settings
        return choose_checkpoint(
            candidates,
            base,
            primary=settings.primary,
            guarded=settings.guarded,
            tolerance=settings.guard_tolerance,
        )


def save_images(images: Tensor, wanted: Sequence[Task], folder: Path) -> None:
    """PNG files <prompt index>-<image index>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, task in zip(images, wanted, strict=True):
        to_picture(image).save(folder / f"{task.prompt_index:04d}-{task.image_index}.png")


def _stacked(of_seeds: Sequence[Scores]) -> Scores:
    """The scores of training seeds as (seeds, n) each."""
    return {name: torch.stack([scores[name] for scores in of_seeds]) for name in of_seeds[0]}


def _first_pictures(folder: Path) -> list[Image.Image]:
    """Of the first prompts, by the first training seed."""
    if seeds := sorted(folder.glob("seed-*"), key=lambda path: int(path.name.removeprefix("seed-"))):
        folder = seeds[0]
    return [Image.open(path).copy() for path in sorted(folder.glob("*-0.png"))[:SAMPLE_COLUMNS]]


def _report(
    tracker: Tracker, folder: Path, metrics: dict[str, Any], samples: Image.Image, validation: Sequence[Row]
) -> None:
    tracker.log_metrics(metrics)
    tracker.log_image("samples", samples)
    for name in TABLES:
        tracker.log_artifact(folder / name)
    for row in validation:
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        seed = f".seed_{row['training_seed']}" if row["training_seed"] != "" else ""
        tracker.log_metrics({f"validation.{row['column']}{seed}": numbers}, step=int(row["unet_forwards"]))
