"""Images and scores of model variants, a batch at a time. Finished batches are kept (see result_cache.py)."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from spo.config import Config, LoraSource, MetricConfig, SamplerConfig
from spo.evaluation.model_variants import ModelVariant, Task
from spo.evaluation.result_cache import ResultCache, digest_of_code, digest_of_model, digest_of_weights
from spo.metrics.metric import Metric, Scores, build_metrics, score
from spo.models.generate import eight_bits, from_bytes, generate, to_bytes
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build
from spo.models.lora import published_lora
from spo.models.policy import load_policy, published_network
from spo.models.schedulers import build_scheduler
from spo.runtime import distributed
from spo.runtime.device import best_device
from spo.runtime.hashing import json_hash
from spo.runtime.progress import progress
from spo.workspace import Workspace

FACTORS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)  # of contrast
IMAGES = "images"  # an entry's images; its other tensors are scores


@dataclass(frozen=True)
class Batch:
    tasks: Sequence[Task]
    key: str
    images: Tensor  # (n, 3, H, W) uint8, as a PNG keeps them; empty if they are not kept
    scores: Scores  # each (n,)


@dataclass(frozen=True)
class _Part:
    """A batch that may have to be made."""

    key: str
    variant: ModelVariant
    tasks: Sequence[Task]
    sampler: SamplerConfig
    keeps_images: bool


class ImageScorer:
    """The model under comparison and its metrics. The model is loaded when a batch is missing, not before."""

    def __init__(self, config: Config, root: Path):
        self.config = config
        self.settings = config.evaluate
        self.device = best_device()
        self.cache = ResultCache(Workspace(config, root).evaluation_cache)
        needed = (self.settings.primary, *self.settings.guarded)
        self.metrics: list[Metric] = build_metrics(self.settings.metrics, self.device, needed=needed)
        self._context = {
            "model": config.model.model_dump(mode="json"),
            "weights": [digest_of_model(path) for path in (config.model.path, config.model.vae) if path],
            "metrics": [metric.model_dump(mode="json") for metric in self.settings.metrics],
            "files": [len(self.metrics), *files_of(self.settings.metrics)],
            "code": digest_of_code(),
            "device": self.device.type,
        }
        self._loaded: Path | None = None
        self.seconds = 0.0  # spent on making and scoring images, without loading

    @cached_property
    def model(self) -> LatentDiffusion:
        model = build(self.config.model, self.config.sampling, self.device)
        for sampler in self.settings.samplers.values():  # a wrong one fails here, before hours of work
            build_scheduler(sampler, model.network.pipeline.scheduler.config)
        return model

    def batches(
        self,
        variant: ModelVariant,
        tasks: Sequence[Task],
        sampler: str,
        *,
        split: str,
        images: bool,
        first: int | None = None,
    ) -> Iterator[Batch]:
        """The variant's scores of the tasks, in order; with `images` also the images.

        first: only batches with one of the first prompts have images; None: all.
        sampler: a name in evaluate.samplers. The key of a batch has the sampler's settings, not its name.
        """
        parts = self._parts(variant, tasks, sampler, images=images, first=first)
        label = f"{split}: {variant.description}, {sampler}"
        self._share(parts, label)
        for part in self._reported(parts, label):
            entry = self._get(part)
            yield Batch(part.tasks, part.key, entry.pop(IMAGES, torch.empty(0)), entry)

    def share(
        self,
        variants: Sequence[ModelVariant],
        tasks: Sequence[Task],
        sampler: str,
        *,
        split: str,
        images: bool,
        first: int | None = None,
    ) -> None:
        """Let each of several processes make its share of the variants' batches, which `batches` then reads.

        So a process does not wait for the others after each variant. With one process this does nothing.
        """
        parts = [part for each in variants for part in self._parts(each, tasks, sampler, images=images, first=first)]
        self._share(parts, f"{split}: {', '.join(dict.fromkeys(each.column for each in variants))}, {sampler}")

    def _share(self, parts: Sequence[_Part], label: str) -> None:
        if distributed.count() == 1:
            return
        for part in self._reported(parts[distributed.rank() :: distributed.count()], label):
            self._get(part)
        distributed.wait()

    def _parts(
        self, variant: ModelVariant, tasks: Sequence[Task], sampler: str, *, images: bool, first: int | None
    ) -> list[_Part]:
        settings, size = self.settings.samplers[sampler], self.settings.batch_size
        inputs = self._context | {"lora": digest_of_variant(variant), "sampler": settings.model_dump(mode="json")}
        parts = []
        for start in range(0, len(tasks), size):
            some = tasks[start : start + size]
            keeps = images and (first is None or any(task.prompt_index < first for task in some))
            key = json_hash(inputs | {"images": keeps, "of": [[task.prompt, task.seed] for task in some]}, 16)
            parts.append(_Part(key, variant, some, settings, keeps))
        return parts

    def _reported(self, parts: Sequence[_Part], label: str) -> Iterable[_Part]:
        """The parts, with their progress if some have to be made."""
        return parts if all(self.cache.holds(part.key) for part in parts) else progress(parts, label=label)

    def _get(self, part: _Part) -> dict[str, Tensor]:
        return self.cache.get(part.key, partial(self._make, part))

    def scores(self, variant: ModelVariant, tasks: Sequence[Task], sampler: str, *, split: str) -> Scores:
        """The scores (n,) of images that are not kept."""
        return joined([batch.scores for batch in self.batches(variant, tasks, sampler, split=split, images=False)])

    def best_contrast(self, batches: Sequence[Batch]) -> tuple[float, Scores]:
        """The factor of contrast with the highest mean primary score of the images, and all scores at this factor."""
        for factor in FACTORS[distributed.rank() :: distributed.count()] if distributed.count() > 1 else ():
            for batch in batches:
                self._at(factor, batch)
        distributed.wait()
        at = {factor: joined([self._at(factor, batch) for batch in batches]) for factor in FACTORS}
        best = max(at, key=lambda factor: at[factor][self.settings.primary].mean().item())
        return best, at[best]

    def _at(self, factor: float, batch: Batch) -> Scores:
        prompts = [task.prompt for task in batch.tasks]
        return self.cache.get(
            json_hash({"contrast": factor, "of": batch.key}, 16),
            lambda: score(self.metrics, eight_bits(contrast(from_bytes(batch.images), factor)), prompts),
        )

    def _make(self, part: _Part) -> dict[str, Tensor]:
        prompts, seeds = [task.prompt for task in part.tasks], [task.seed for task in part.tasks]
        with self._as(part.variant):
            start = time.perf_counter()
            made = generate(self.model, prompts, seeds, sampler=part.sampler, batch_size=len(part.tasks))
        images = to_bytes(made)
        scores = score(self.metrics, from_bytes(images), prompts)
        self.seconds += time.perf_counter() - start
        return {**scores, **({IMAGES: images} if part.keeps_images else {})}

    def _as(self, variant: ModelVariant) -> AbstractContextManager[None]:
        """Make the model the variant for the block."""
        if (other := variant.published) is not None:
            self._loaded = None  # a published model takes the place of ours
            network = self.model.network
            if isinstance(other, LoraSource):
                return published_lora(network, other.source, weight_name=other.weight_name, revision=other.revision)
            return published_network(network, other.source, subfolder=other.subfolder, revision=other.revision)
        if variant.checkpoint is None:
            return self.model.reference()
        if variant.checkpoint != self._loaded:
            load_policy(self.model.network, variant.checkpoint)
            self._loaded = variant.checkpoint
        return self.model.merged()


def files_of(metrics: Sequence[MetricConfig]) -> list[str]:
    """Digests of the metrics' files: they change when a file is replaced under its name."""
    return [digest_of_model(source) for metric in metrics for source in metric.sources]


def digest_of_variant(variant: ModelVariant) -> list[str | None]:
    """A digest of the variant's weights."""
    other = variant.published
    if isinstance(other, LoraSource):
        return [digest_of_model(other.source), other.weight_name, other.revision]
    if other is not None:
        return [digest_of_model(other.source), other.subfolder, other.revision]
    return [None if variant.checkpoint is None else digest_of_weights(variant.checkpoint)]


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of all images, from those of the batches."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def contrast(images: Tensor, factor: float) -> Tensor:
    """The control: images (n, 3, h, w) in [0, 1] with `factor` times their distances from mid-grey."""
    return ((images - 0.5) * factor + 0.5).clamp(0, 1)
