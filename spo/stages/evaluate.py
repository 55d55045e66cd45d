"""Compare base and aligned models on the same held-out prompts, seeds and samplers.

Each method's checkpoint is chosen on the validation prompts; the scores reported are of the test prompts. A control
column shows what the best change of contrast alone makes of the base's images.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spo.config import Config
from spo.device import best_device
from spo.errors import DataError, ModelError
from spo.evaluation.choice import choose_checkpoint
from spo.evaluation.controls import best_contrast
from spo.evaluation.generate import eight_bits, generate, image_seed
from spo.evaluation.metrics import Scores, build_metrics, score
from spo.evaluation.pictures import plain_sheet, to_picture
from spo.evaluation.statistics import mean_interval, paired_difference
from spo.files import atomic_path, read_json, write_json
from spo.models.base import LatentDiffusion
from spo.models.load import build
from spo.models.lora import borrowed_lora
from spo.models.policy import load_policy
from spo.tables import write_csv
from spo.tracking import Tracker

BASE, CONTROL = "base", "contrast"
FACTORS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
SAMPLE_COLUMNS = 10


@dataclass(frozen=True)
class Task:
    """One image to make: of a prompt of a split, with a seed of its own."""

    prompt_index: int
    image_index: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Result:
    """A column of the comparison under one sampler."""

    column: str
    eta: float
    images: Tensor  # (n, 3, H, W) on the CPU
    scores: Scores
    factor: float | None = None  # of the contrast, where that is the column


def run(config: Config, *, root: Path = Path(), tracker: Tracker) -> None:
    """Write images/, lora/, samples.png, scores.csv, validation.csv and metrics.json to runs/<profile>/evaluate."""
    start = time.perf_counter()
    evaluation = Evaluation(config, root)
    with atomic_path(root / config.folder("evaluate")) as folder:
        folder.mkdir()
        validation, chosen = evaluation.choose(folder)
        results = evaluation.compare(chosen)
        write_csv(folder / "validation.csv", validation)
        write_csv(folder / "scores.csv", evaluation.rows(results))
        metrics = {**evaluation.metrics(results, chosen), "seconds": round(time.perf_counter() - start, 1)}
        write_json(folder / "metrics.json", metrics)
        first = [result for result in results if result.eta == config.evaluate.etas[0]]
        for result in first:
            save_images(result.images, evaluation.test, folder / "images" / result.column)
        samples = plain_sheet(
            [[to_picture(i) for i in result.images[:SAMPLE_COLUMNS]] for result in first if result.column != CONTROL]
        )
        samples.save(folder / "samples.png")
    tracker.log_metrics(metrics)
    tracker.log_image("samples", samples)
    for step, row in enumerate(validation):
        tracker.log_metrics({f"validation_{row['column']}": _numbers(row)}, step=step)


class Evaluation:
    """The model under comparison and the images to be made of it."""

    def __init__(self, config: Config, root: Path):
        self.config = config.evaluate
        self.methods = config.methods
        self.aligned = {name: root / config.aligned(name, config.training_seeds[0]) for name in config.methods}
        prompts = root / config.folder("prepare") / "prompts"
        seed = config.evaluate.seed
        self.validation = tasks(prompts / "validation.txt", config.evaluate.num_validation_prompts, 1, seed)
        self.test = tasks(prompts / "test.txt", config.evaluate.num_prompts, config.evaluate.images_per_prompt, seed)
        device = best_device()
        needed = (config.evaluate.primary, *config.evaluate.guarded)
        self.model: LatentDiffusion = build(config.model, config.sampling, device)
        self.judges = build_metrics(config.evaluate.metrics, device, needed=needed)

    def choose(self, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Path]]:
        """Score every checkpoint on the validation prompts; rows for the table, and each method's choice."""
        eta = self.config.etas[0]
        base = _means(self._generate(BASE, self.validation, eta, "validation: base").scores)
        rows = [{"column": BASE, "checkpoint": BASE, "seconds": 0.0, "unet_forwards": 0, **base}]
        chosen = {}
        for name in self.methods:
            checkpoints = sorted((self.aligned[name] / "checkpoints").glob("step-*"))
            if not checkpoints:
                raise ModelError(f"{self.aligned[name]} holds no checkpoints; run `python -m spo align {name}`")
            means = []
            for checkpoint in checkpoints:
                load_policy(self.model, checkpoint)
                label = f"validation: {name} {checkpoint.name}"
                means.append(_means(self._generate(name, self.validation, eta, label).scores))
                cost = read_json(checkpoint / "cost.json")
                taken = {"seconds": cost["seconds"], "unet_forwards": cost["unet_forwards"]}
                rows.append({"column": name, "checkpoint": checkpoint.name, **taken, **means[-1]})
            best = choose_checkpoint(
                means,
                base,
                primary=self.config.primary,
                guarded=self.config.guarded,
                tolerance=self.config.guard_tolerance,
            )
            chosen[name] = checkpoints[best]
            shutil.copytree(checkpoints[best], folder / "lora" / name)
        return rows, chosen

    def compare(self, chosen: dict[str, Path]) -> list[Result]:
        """Base, control, every method's choice and the LoRAs of others on the test prompts, under each sampler."""
        results = []
        for name in (BASE, *chosen):
            if name != BASE:
                load_policy(self.model, chosen[name])
            for eta in self.config.etas:
                results.append(self._generate(name, self.test, eta, f"test: {name}, eta {eta:g}"))
                if name == BASE:
                    results.append(self._control(results[-1]))
        for name, lora in self.config.loras.items():
            with borrowed_lora(self.model, lora.source, weight_name=lora.weight_name, revision=lora.revision):
                for eta in self.config.etas:
                    results.append(self._generate(name, self.test, eta, f"test: {name}, eta {eta:g}"))
        return results

    def _generate(self, column: str, wanted: Sequence[Task], eta: float, label: str) -> Result:
        prompts = [task.prompt for task in wanted]

        def make() -> Tensor:
            return generate(
                self.model,
                prompts,
                [task.seed for task in wanted],
                steps=self.config.steps,
                guidance_scale=self.config.guidance_scale,
                eta=eta,
                batch_size=self.config.batch_size,
                label=label,
            )

        if column == BASE:
            with self.model.reference():
                images = make()
        else:
            images = make()
        images = eight_bits(images)
        return Result(column, eta, images, score(self.judges, images, prompts))

    def _control(self, base: Result) -> Result:
        """The base's images at the contrast that the primary score likes best."""

        def primary(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return score(self.judges, images, prompts)[self.config.primary]

        prompts = [task.prompt for task in self.test]
        factor, images = best_contrast(base.images, prompts, primary, FACTORS)
        return Result(CONTROL, base.eta, images, score(self.judges, images, prompts), factor)

    def rows(self, results: list[Result]) -> list[dict[str, Any]]:
        """One row an image."""
        return [
            {
                "column": result.column,
                "eta": result.eta,
                "prompt_index": task.prompt_index,
                "image_index": task.image_index,
                "prompt": task.prompt,
                **{name: values[i].item() for name, values in result.scores.items()},
            }
            for result in results
            for i, task in enumerate(self.test)
        ]

    def metrics(self, results: list[Result], chosen: dict[str, Path]) -> dict[str, Any]:
        """Means and differences from the base, with 95% intervals, under each sampler."""
        groups = [task.prompt for task in self.test]
        samples = self.config.bootstrap_samples
        table: dict[str, Any] = {"prompts": len(set(groups)), "images": len(groups)}
        table["checkpoint"] = {name: path.name for name, path in chosen.items()}
        for eta in self.config.etas:
            of_sampler = [result for result in results if result.eta == eta]
            at_eta = {result.column: result.scores for result in of_sampler}
            section: dict[str, Any] = {}
            for column, scores in at_eta.items():
                section[column] = {
                    name: _rounded(asdict(mean_interval(values.numpy(), groups, samples=samples)))
                    for name, values in scores.items()
                }
                if column == BASE:
                    continue
                section[f"{column}_vs_base"] = {
                    name: _rounded(
                        asdict(paired_difference(values.numpy(), at_eta[BASE][name].numpy(), groups, samples=samples))
                    )
                    for name, values in scores.items()
                }
            section[CONTROL]["factor"] = next(r.factor for r in of_sampler if r.column == CONTROL)
            table[f"eta_{eta:g}"] = section
        return table


def tasks(path: Path, num_prompts: int, images_per_prompt: int, seed: int) -> list[Task]:
    """The first `num_prompts` prompts of a prepared file, `images_per_prompt` seeds each."""
    if not path.is_file():
        raise DataError(f"{path} is missing; run `python -m spo prepare`")
    prompts = path.read_text(encoding="utf-8").splitlines()[:num_prompts]
    if len(prompts) < 2:
        raise DataError(f"{path} holds {len(prompts)} prompts; evaluation needs at least 2")
    return [
        Task(i, j, prompt, image_seed(seed, prompt, j))
        for i, prompt in enumerate(prompts)
        for j in range(images_per_prompt)
    ]


def save_images(images: Tensor, wanted: Sequence[Task], folder: Path) -> None:
    """PNG files <prompt index>-<image index>.png."""
    folder.mkdir(parents=True)
    for image, task in zip(images, wanted, strict=True):
        to_picture(image).save(folder / f"{task.prompt_index:04d}-{task.image_index}.png")


def _means(scores: Scores) -> dict[str, float]:
    return {name: values.mean().item() for name, values in scores.items()}


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not isinstance(value, str)}
