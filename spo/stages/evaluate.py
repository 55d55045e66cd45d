"""Compare base and aligned models on the same held-out prompts, seeds and samplers.

One rule chooses each training's checkpoint on the validation prompts; the reported scores are of the test prompts. The
control column shows the base's images with the best change of contrast. Finished batches are cached in .cache/evaluate,
so an evaluation that was killed resumes with them.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from spo.config import Config
from spo.evaluation.checkpoint_selection import choose_checkpoint
from spo.evaluation.image_scorer import ImageScorer, contrast, joined
from spo.evaluation.model_variants import BASE, CONTROL, OTHERS_PROMPTS, ModelVariant, Task, checkpoints, tasks
from spo.evaluation.tables import Column, Row, compact, comparison_rows, mean_rows, score_rows
from spo.metrics.metric import Scores, cut_prompts
from spo.models.generate import eight_bits, from_bytes
from spo.runtime import distributed
from spo.runtime.device import memory_advice
from spo.runtime.files import atomic_path, write_csv, write_json
from spo.runtime.pictures import row_sheet, to_picture
from spo.tracking import Tracker
from spo.workspace import Workspace

SAMPLE_COLUMNS = 10
TABLES = ("means.csv", "comparisons.csv", "validation.csv", "validation_scores.csv", "scores.csv")
Chosen = dict[str, dict[int, ModelVariant]]  # by method and training seed


def run(config: Config, *, root: Path = Path(), tracker: Tracker) -> None:
    """Write images/, other_samplers/, lora/, samples.png, metrics.json and five tables to runs/<profile>/evaluate.

    images/ is of the deciding sampler, other_samplers/ of the first prompts with each other one. lora/<method> holds
    the LoRA of the training seed that the rule chooses on the validation prompts.
    """
    start = time.perf_counter()
    evaluation = Evaluation(config, root)
    advice = f"lower evaluate.batch_size, now {config.evaluate.batch_size}"
    target = Workspace(config, root).evaluate
    with memory_advice(advice), distributed.written_by_main(atomic_path(target)) as folder:
        folder.mkdir()
        validation, chosen = evaluation.choose()
        (folder / "other_samplers").mkdir()
        columns, factor = evaluation.compare(chosen, folder)
        metrics = evaluation.write_tables(folder, columns, validation)
        if cut := evaluation.cut_prompts():
            metrics["cut"] = cut
        for name, variant in evaluation.release(validation, chosen).items():
            assert variant.checkpoint is not None
            shutil.copytree(variant.checkpoint, folder / "lora" / name)
            metrics[name]["released"] = f"seed-{variant.training_seed}/{variant.checkpoint.name}"
        metrics[CONTROL]["factor"] = factor
        metrics["seconds"] = round(time.perf_counter() - start, 1)
        write_json(folder / "metrics.json", metrics)
        if distributed.is_main():
            samples = evaluation.samples(columns, folder / "images")
            samples.save(folder / "samples.png")
    if distributed.is_main():
        evaluation.image_scorer.cache.tidy()
        _report(tracker, target, metrics, samples, validation)


class Evaluation:
    """The images to make, and the scorer that makes and scores them."""

    def __init__(self, config: Config, root: Path):
        self.config = config
        self.settings = settings = config.evaluate
        prepared = Workspace(config, root).prepared
        self.validation = tasks(prepared, "validation", settings.num_validation_prompts, 1, settings.seed)
        self.test = tasks(prepared, "test", settings.num_prompts, settings.images_per_prompt, settings.seed)
        self.trainings = {
            name: {seed: checkpoints(config, name, seed, root) for seed in config.training_seeds}
            for name in config.methods
        }
        self.validation_scores: list[Row] = []  # of each image, in the primary and guarded scores
        self.others = [ModelVariant(name, published=source) for name, source in settings.published.items()]
        self.image_scorer = ImageScorer(config, root)

    def cut_prompts(self) -> dict[str, int]:
        """By a metric's name, how many test prompts its text encoder cuts, if it cuts any; with a warning."""
        prompts = list(dict.fromkeys(task.prompt for task in self.test))
        found = cut_prompts(self.image_scorer.metrics, prompts)
        for name, cut in found.items() if distributed.is_main() else ():
            text = f"warning: the metric {name} cuts {len(cut)} of {len(prompts)} prompts, which are too long for it"
            print(f"{text}: {cut[0]!r}", file=sys.stderr, flush=True)
        return {name: len(cut) for name, cut in found.items()}

    def choose(self) -> tuple[list[Row], Chosen]:
        """Score every checkpoint on the validation prompts; a row for each, and the choice for each training."""
        trained = (each for by_seed in self.trainings.values() for some in by_seed.values() for each in some)
        variants = [ModelVariant(BASE), *trained]
        self.image_scorer.share(variants, self.validation, self.settings.deciding, split="validation", images=False)
        rows = [self._validation_row(ModelVariant(BASE))]
        chosen: Chosen = {}
        for name, by_seed in self.trainings.items():
            for seed, candidates in by_seed.items():
                found = [self._validation_row(variant) for variant in candidates]
                best = self._best(found, rows[0])
                found[best]["chosen"] = 1
                chosen.setdefault(name, {})[seed] = candidates[best]
                rows += found
        return rows, chosen

    def release(self, validation: Sequence[Row], chosen: Chosen) -> dict[str, ModelVariant]:
        """Choose a training seed of each method, by the same rule on the same prompts."""
        base, *rows = validation
        released = {}
        for name, by_seed in chosen.items():
            best = self._best([row for row in rows if row["column"] == name and row["chosen"]], base)
            released[name] = list(by_seed.values())[best]
        return released

    def compare(self, chosen: Chosen, folder: Path) -> tuple[list[Column], float]:
        """Score the base, the control, the chosen checkpoints and published LoRAs on the test prompts.

        Images go to `folder`. Returns the columns, sampler by sampler, and the control's factor of contrast for the
        deciding sampler.
        """
        columns: list[Column] = []
        factors: list[float] = []
        for sampler in self.settings.samplers:
            keep = folder / ("images" if sampler == self.settings.deciding else f"other_samplers/{sampler}")
            columns += self._untrained(sampler, keep, factors)
            trained = [variant for by_seed in chosen.values() for variant in by_seed.values()]
            self.image_scorer.share([*trained, *self.others], **self._wanted(sampler))
            for name, by_seed in chosen.items():
                scores = [self._scores(variant, sampler, keep) for variant in by_seed.values()]
                columns.append(Column(name, sampler, tuple(by_seed), _stacked(scores)))
            for other in self.others:
                columns.append(Column(other.column, sampler, (None,), _stacked([self._scores(other, sampler, keep)])))
        return columns, factors[0]

    def write_tables(self, folder: Path, columns: Sequence[Column], validation: Sequence[Row]) -> dict[str, Any]:
        """Write the tables; the metrics of the stage."""
        settings, prompts = self.settings, [task.prompt for task in self.test]
        means = mean_rows(columns, prompts, samples=settings.bootstrap_samples)
        comparisons = comparison_rows(columns, prompts, samples=settings.bootstrap_samples)
        tables = (means, comparisons, validation, self.validation_scores, score_rows(columns, self.test))
        for name, rows in zip(TABLES, tables, strict=True):
            write_csv(folder / name, rows)
        facts = {"sampler": settings.deciding, "prompts": len(set(prompts)), "images": len(prompts)}
        facts["training_seeds"] = len(self.config.training_seeds)
        which: dict[str, Any] = {"primary": settings.primary, "guarded": settings.guarded}
        return {**facts, **compact(means, comparisons, sampler=settings.deciding, **which)}

    def samples(self, columns: Sequence[Column], images: Path) -> Image.Image:
        """A sheet of the base and the methods, first training seed, for prompts that show the first method fairly.

        The prompts are ordered by its gain over the base and chosen at equal distances, from losses to gains.
        """
        settings = self.settings
        scores = {
            column.name: column.scores[settings.primary][0] for column in columns if column.sampler == settings.deciding
        }
        first = self.config.methods[0]
        gain = scores[first] - scores[BASE]  # (n,)
        places = [i for i, task in enumerate(self.test) if task.image_index == 0]
        places.sort(key=lambda i: gain[i].item())
        count = min(SAMPLE_COLUMNS, len(places))
        chosen = [places[int((i + 0.5) / count * len(places))] for i in range(count)]

        def picture(name: str, place: int) -> Image.Image:
            return Image.open(images / name / self.test[place].file).copy()

        seed = self.config.training_seeds[0]
        names = {BASE: BASE, **{name: ModelVariant(name, seed).place for name in self.config.methods}}
        title = (
            f"{count} of {len(places)} test prompts, at equal distances from the largest loss of {first} to its "
            f"largest gain; above each column: {first} minus {BASE} in {settings.primary}"
        )
        rows = {name: [picture(place, i) for i in chosen] for name, place in names.items()}
        return row_sheet(rows, title, [f"{gain[i]:+.3f}" for i in chosen])

    def _untrained(self, sampler: str, folder: Path, factors: list[float]) -> list[Column]:
        base = ModelVariant(BASE)
        batches = list(self.image_scorer.batches(base, self.test, sampler, split="test", images=True))
        factor, control = self.image_scorer.best_contrast(batches)
        factors.append(factor)
        for batch in batches:
            images = from_bytes(batch.images)
            self._save(images, batch.tasks, sampler, folder / BASE)
            self._save(eight_bits(contrast(images, factor)), batch.tasks, sampler, folder / CONTROL)
        own = joined([batch.scores for batch in batches])
        return [
            Column(name, sampler, (None,), _stacked([scores])) for name, scores in ((BASE, own), (CONTROL, control))
        ]

    def _scores(self, variant: ModelVariant, sampler: str, folder: Path) -> Scores:
        scores = []
        for batch in self.image_scorer.batches(variant, **self._wanted(sampler)):
            scores.append(batch.scores)
            if len(batch.images):
                self._save(from_bytes(batch.images), batch.tasks, sampler, folder / variant.place)
        return joined(scores)

    def _wanted(self, sampler: str) -> dict[str, Any]:
        """Which batches of a trained model are made; other samplers keep only the first prompts' images."""
        first = None if sampler == self.settings.deciding else OTHERS_PROMPTS
        return {"tasks": self.test, "sampler": sampler, "split": "test", "images": True, "first": first}

    def _save(self, images: Tensor, tasks: Sequence[Task], sampler: str, folder: Path) -> None:
        """PNG files <prompt index>-<image index>.png; of other samplers only the first image of the first prompts."""
        if not distributed.is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        for image, task in zip(images, tasks, strict=True):
            is_first = task.prompt_index < OTHERS_PROMPTS and task.image_index == 0
            if is_first or sampler == self.settings.deciding:
                to_picture(image).save(folder / task.file)

    def _validation_row(self, variant: ModelVariant) -> Row:
        scores = self.image_scorer.scores(variant, self.validation, self.settings.deciding, split="validation")
        names = {
            "column": variant.column,
            "training_seed": "" if variant.training_seed is None else variant.training_seed,
            "checkpoint": BASE if variant.checkpoint is None else variant.checkpoint.name,
        }
        self.validation_scores += [
            {**names, "prompt_index": task.prompt_index}
            | {name: scores[name][i].item() for name in (self.settings.primary, *self.settings.guarded)}
            for i, task in enumerate(self.validation)
        ]
        return {
            **names,
            **variant.cost(),
            "chosen": 0,
            "primary": scores[self.settings.primary]
            .mean()
            .item(),  # has the same name in every profile, for DVC's plot
            **{name: values.mean().item() for name, values in scores.items()},
        }

    def _best(self, candidates: Sequence[Row], base: Row) -> int:
        settings = self.settings
        which: dict[str, Any] = {"primary": settings.primary, "guarded": settings.guarded}
        return choose_checkpoint(candidates, base, tolerance=settings.guard_tolerance, **which)


def _stacked(of_seeds: Sequence[Scores]) -> Scores:
    """The scores of all training seeds, each (seeds, n)."""
    return {name: torch.stack([scores[name] for scores in of_seeds]) for name in of_seeds[0]}


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
