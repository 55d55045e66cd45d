"""Train the step-aware preference model on the prepared pairs, or take over one that is named."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from spo.config import Config, LabelsConfig
from spo.data.images import decode_image
from spo.data.preferences import PreferencePair, PreferencePairs
from spo.device import best_device
from spo.errors import DataError
from spo.files import atomic_path, write_json
from spo.models.base import LatentDiffusion
from spo.models.load import build
from spo.preference.checkpoint import load_clip, load_preference_model, save_preference_model
from spo.preference.labels import human_labels, prompt_weights, pseudo_labels
from spo.preference.score import PreferenceScorer
from spo.progress import progress
from spo.tables import write_csv
from spo.tracking import Tracker
from spo.training.preference import LabelledPairs, StepAwareTraining

PAIRS_AT_A_TIME = 32


def run(config: Config, *, root: Path = Path(), tracker: Tracker) -> None:
    """Write model/, accuracy.csv, history.csv and metrics.json to runs/<profile>/train_preference."""
    start = time.perf_counter()
    settings = config.train_preference
    prepared = root / config.folder("prepare") / "preferences"
    device = best_device()
    base = build(config.model, config.sampling, device)
    validation = load_pairs(prepared / "validation.parquet", base, config, limit=settings.evaluate_pairs)
    if settings.checkpoint is not None:
        preference = load_preference_model(settings.checkpoint)
    else:
        preference = load_clip(
            settings.start_from,
            processor=settings.processor,
            preprocessing=settings.preprocessing,
            generator=torch.Generator().manual_seed(config.seed),
        )
    training = StepAwareTraining(base, preference, settings)
    accuracy = _accuracies(training, validation, "start", config)
    history: list[dict[str, float]] = []
    if settings.checkpoint is None:
        pairs = load_pairs(prepared / "train.parquet", base, config)
        history = _train(training, pairs, config, tracker)
        accuracy += _accuracies(training, validation, "trained", config)
    with atomic_path(root / config.folder("train_preference")) as folder:
        save_preference_model(preference.model.cpu(), preference.tokenizer, preference.preprocess, folder / "model")
        write_csv(folder / "accuracy.csv", accuracy)
        write_csv(folder / "history.csv", history)
        write_json(folder / "metrics.json", _metrics(accuracy, history, time.perf_counter() - start))
    for row in accuracy:
        tracker.log_metrics({f"accuracy_{row['model']}": row["accuracy"]}, step=row["timestep"])


def _train(
    training: StepAwareTraining, pairs: LabelledPairs, config: Config, tracker: Tracker
) -> list[dict[str, float]]:
    history = []
    steps = training.train(pairs, seed=config.seed)
    with progress(total=config.train_preference.steps, label="train_preference") as bar:
        for step, row in enumerate(steps, start=1):
            history.append({"step": step, **row})
            bar.update(loss=row["loss"], accuracy=row["accuracy"])
            if step % config.train_preference.log_every == 0:
                tracker.log_metrics(row, step=step)
    return history


def _accuracies(training: StepAwareTraining, pairs: LabelledPairs, name: str, config: Config) -> list[dict[str, Any]]:
    """One row a timestep."""
    rows = []
    for timestep in progress(config.train_preference.evaluate_timesteps, label=f"accuracy of the {name} model"):
        accuracy, count = training.accuracy(pairs, timestep, seed=config.seed)
        rows.append({"timestep": timestep, "model": name, "accuracy": accuracy, "n": count})
    return rows


def _metrics(accuracy: list[dict[str, Any]], history: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    by_model: dict[str, dict[str, float]] = {}
    for row in accuracy:
        by_model.setdefault(row["model"], {})[f"t_{row['timestep']}"] = round(row["accuracy"], 4)
    tail = history[-50:]
    loss = {"loss": round(sum(row["loss"] for row in tail) / len(tail), 4)} if tail else {}
    return {
        "accuracy": by_model,
        "pairs": accuracy[0]["n"],
        "steps": len(history),
        **loss,
        "seconds": round(seconds, 1),
    }


def load_pairs(path: Path, base: LatentDiffusion, config: Config, *, limit: int | None = None) -> LabelledPairs:
    """Prepared pairs (the first `limit`) with their images encoded once, and their labels: people's, or a model's.

    Raises DataError where no pair is decided, for then there is nothing to learn or to measure.
    """
    labels, resolution = config.train_preference.labels, config.model.resolution
    stored = PreferencePairs(path)
    num_pairs = min(len(stored), limit or len(stored))
    judge = _judge(labels, base) if labels.model else None
    latents, label = [], []
    for part in progress(torch.arange(num_pairs).split(PAIRS_AT_A_TIME), label=f"encode {path.stem} pairs"):
        pairs = [stored[i] for i in part.tolist()]
        images = torch.stack([_pixels(image, resolution) for pair in pairs for image in (pair.image_0, pair.image_1)])
        latents.append(base.encode_images(images.to(base.device)).cpu().unflatten(0, (-1, 2)))
        label.append(_opinion(judge, images, pairs, labels) if judge else _votes(pairs))
    captions = stored.captions[:num_pairs]
    result = LabelledPairs(torch.cat(latents), torch.cat(label), prompt_weights(captions), captions)
    if not (result.label[:, 0] != result.label[:, 1]).any():
        raise DataError(f"{path}: all {len(result)} pairs are ties; there must be decided ones")
    return result


def _judge(labels: LabelsConfig, base: LatentDiffusion) -> PreferenceScorer:
    return PreferenceScorer(load_clip(labels.model, processor=labels.processor), device=base.device)


def _votes(pairs: list[PreferencePair]) -> Tensor:
    return human_labels(torch.tensor([[pair.label_0, pair.label_1] for pair in pairs]))


def _opinion(judge: PreferenceScorer, images: Tensor, pairs: list[PreferencePair], labels: LabelsConfig) -> Tensor:
    text = judge.encode([pair.caption for pair in pairs]).repeat_interleave(2, dim=0)
    scores = judge(images, text, torch.zeros(len(images), dtype=torch.long)).cpu()
    return pseudo_labels(scores.unflatten(0, (-1, 2)), tie_margin=labels.tie_margin)


def _pixels(data: bytes, resolution: int) -> Tensor:
    """Image bytes as (3, resolution, resolution) in [0, 1]: shortest side resized, centre cropped."""
    image = ImageOps.fit(decode_image(data), (resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
