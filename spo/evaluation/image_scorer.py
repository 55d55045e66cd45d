"""Images and scores of subjects, a batch at a time, of which finished ones are kept (see shelf.py)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from spo.config import Config, MetricConfig
from spo.evaluation.controls import contrast
from spo.evaluation.model_variants import ModelVariant, Task
from spo.evaluation.result_cache import ResultCache, digest_of_code, digest_of_model, digest_of_weights, key_of
from spo.metrics.metric import Metric, Scores, build_metrics, score
from spo.models.generate import eight_bits, from_bytes, generate, to_bytes
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build
from spo.models.lora import published_lora
from spo.models.policy import load_policy
from spo.runtime import distributed
from spo.runtime.device import best_device
from spo.runtime.progress import progress
from spo.workspace import Workspace

FACTORS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)  # of contrast
IMAGES = "images"  # an entry's images; its other tensors are scores


@dataclass(frozen=True)
class Batch:
    tasks: Sequence[Task]
    key: str
    images: Tensor  # (n, 3, H, W) uint8, as a PNG keeps them; empty where they were not wanted
    scores: Scores  # each (n,)


class ImageScorer:
    """The model under comparison and its judges; weights are loaded when a batch is missing, not before."""

    def __init__(self, config: Config, root: Path):
        self.config = config
        self.settings = config.evaluate
        self.device = best_device()
        self.shelf = ResultCache(Workspace(config, root).evaluation_cache)
        needed = (self.settings.primary, *self.settings.guarded)
        self.judges: list[Metric] = build_metrics(self.settings.metrics, self.device, needed=needed)
        self._context = {
            "model": config.model.model_dump(mode="json"),
            "weights": [digest_of_model(path) for path in (config.model.path, config.model.vae) if path],
            "sampler": [self.settings.steps, self.settings.guidance_scale],
            "metrics": [metric.model_dump(mode="json") for metric in self.settings.metrics],
            "judges": [len(self.judges), *files_of(self.settings.metrics)],
            "code": digest_of_code(),
            "device": self.device.type,
        }
        self._loaded: Path | None = None

    @cached_property
    def model(self) -> LatentDiffusion:
        return build(self.config.model, self.config.sampling, self.device)

    def batches(
        self, subject: ModelVariant, tasks: Sequence[Task], eta: float, *, split: str, images: bool
    ) -> Iterator[Batch]:
        """The subject's images of the tasks, judged, in their order; with the images themselves where wanted.

        Of several processes each makes its share of the batches, and takes the others' from the shelf.
        """
        weights = digest_of_variant(subject)
        size = self.settings.batch_size
        parts = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        keys = [
            key_of(**self._context, lora=weights, eta=eta, images=images, of=[[t.prompt, t.seed] for t in part])
            for part in parts
        ]
        label = f"{split}: {subject.words}, eta {eta:g}"
        both = list(zip(parts, keys, strict=True))
        for part, key in both[distributed.rank() :: distributed.count()] if distributed.count() > 1 else ():
            self.shelf.get(key, partial(self._make, subject, part, eta, images))
        distributed.wait()
        for part, key in both if all(map(self.shelf.holds, keys)) else progress(both, label=label):
            entry = self.shelf.get(key, partial(self._make, subject, part, eta, images))
            yield Batch(part, key, entry.pop(IMAGES, torch.empty(0)), entry)

    def scores(self, subject: ModelVariant, tasks: Sequence[Task], eta: float, *, split: str) -> Scores:
        """Each (n,), of images that are not kept."""
        return joined([batch.scores for batch in self.batches(subject, tasks, eta, split=split, images=False)])

    def best_contrast(self, batches: Sequence[Batch]) -> tuple[float, Scores]:
        """The one factor of contrast that gives images their highest mean primary score, and all scores at it."""
        at = {factor: joined([self._at(factor, batch) for batch in batches]) for factor in FACTORS}
        best = max(at, key=lambda factor: at[factor][self.settings.primary].mean().item())
        return best, at[best]

    def with_contrast(self, images: Tensor, factor: float) -> Tensor:
        """Images in [0, 1] as the control shows them."""
        return eight_bits(contrast(images, factor))

    def _at(self, factor: float, batch: Batch) -> Scores:
        prompts = [task.prompt for task in batch.tasks]
        return self.shelf.get(
            key_of(contrast=factor, of=batch.key),
            lambda: score(self.judges, self.with_contrast(from_bytes(batch.images), factor), prompts),
        )

    def _make(self, subject: ModelVariant, tasks: Sequence[Task], eta: float, keep: bool) -> dict[str, Tensor]:
        prompts = [task.prompt for task in tasks]
        with self._as(subject):
            made = generate(
                self.model,
                prompts,
                [task.seed for task in tasks],
                steps=self.settings.steps,
                guidance_scale=self.settings.guidance_scale,
                eta=eta,
                batch_size=len(tasks),
            )
        pictures = to_bytes(made)
        return {**score(self.judges, from_bytes(pictures), prompts), **({IMAGES: pictures} if keep else {})}

    def _as(self, subject: ModelVariant) -> AbstractContextManager[None]:
        """Within it the model is the subject."""
        if subject.borrowed is not None:
            self._loaded = None  # nothing of ours is left afterwards
            lora = subject.borrowed
            return published_lora(self.model.network, lora.source, weight_name=lora.weight_name, revision=lora.revision)
        if subject.checkpoint is None:
            return self.model.reference()
        if subject.checkpoint != self._loaded:
            load_policy(self.model.network, subject.checkpoint)
            self._loaded = subject.checkpoint
        return self.model.merged()


def files_of(metrics: Sequence[MetricConfig]) -> list[str]:
    """What tells the judges' files from others under the same names, where they are files here."""
    named = [value for metric in metrics for value in metric.model_dump().values() if isinstance(value, str)]
    return [digest_of_model(value) for value in named]


def digest_of_variant(subject: ModelVariant) -> list[str | None]:
    """What tells its weights from those of other subjects."""
    if subject.borrowed is not None:
        lora = subject.borrowed
        return [digest_of_model(lora.source), lora.weight_name, lora.revision]
    return [None if subject.checkpoint is None else digest_of_weights(subject.checkpoint)]


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of batches as those of all their images."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
