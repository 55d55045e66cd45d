"""The steps that every kind of preference model trains by.

A kind says how the pairs look to it: `scores`, the noise and the times. All else is here: batches keyed to (seed,
step), shares of several processes, micro-batches, the loss scale, what is skipped, and the state of a run.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from spo.config import Config, SafetyConfig, TrainPreferenceConfig
from spo.core.losses import preference_loss
from spo.core.noise import epoch_seed
from spo.core.types import LabelledPairs, Scorer
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.labels import pairwise_accuracy
from spo.runtime import distributed
from spo.training.adamw import adamw
from spo.training.guards import FiniteGuard, Streak
from spo.training.updates import Updater

REMEDY = "lower its learning_rate, set max_grad_norm, or train in float32 or bfloat16"

Row = dict[str, float] | None  # a step's measurements; None if the step was skipped


class PreferenceTraining(ABC):
    """A preference model that trains on pairs of the base's latents."""

    no_gradient_remedy: ClassVar[str]  # where to look when there has been no gradient for long

    def __init__(
        self,
        base: LatentDiffusion,
        model: nn.Module,
        config: TrainPreferenceConfig,
        safety: SafetyConfig | None = None,
    ):
        safety = safety or SafetyConfig()
        self.base = base
        self.model: Any = model.to(base.device)
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        self.updater = Updater(
            adamw(list(self.model.parameters()), weight_decay=config.weight_decay, eight_bit=config.eight_bit),
            FiniteGuard(safety.max_skipped_in_a_row, REMEDY),
            dtype=self.dtype,
            max_grad_norm=config.max_grad_norm,
        )
        self._no_gradient = Streak(
            safety.stuck_after,
            "for {n} steps the preference model has had no gradient; its scores do not differ between the images of a "
            f"pair: look at {self.no_gradient_remedy}",
        )

    @property
    def skipped(self) -> int:
        """Updates that were not finite."""
        return self.updater.guard.skipped

    @classmethod
    @abstractmethod
    def start(cls, base: LatentDiffusion, config: Config, name: str) -> Self:
        """The training of the preference model `name` at its start, or around its `checkpoint`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model's folder."""

    @abstractmethod
    def scorer(self) -> Scorer:
        """A scorer of candidates by the model; do not train it while the scorer is in use."""

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """() before exp."""

    @abstractmethod
    def times(self, n: int, generator: Generator) -> Tensor:
        """Random times (n,), one a pair."""

    @abstractmethod
    def noise(self, pairs: LabelledPairs, index: Tensor, generator: Generator) -> Tensor:
        """Standard normal (n, 1 or 2, c, h, w) for the pairs at `index` (n,)."""

    @abstractmethod
    def scores(self, pairs: LabelledPairs, index: Tensor, t: Tensor, noise: Tensor, *, clean: bool = False) -> Tensor:
        """Scores (n, 2) of the pairs at `index` (n,), noised to times t (n,); clean: of the images as they are."""

    def train(self, pairs: LabelledPairs, *, seed: int) -> Iterator[Row]:
        """Train in place, all steps; yields each one's measurements."""
        for step in range(self.config.steps):
            yield self.step(pairs, step, seed=seed)
        self.model.eval()

    def step(self, pairs: LabelledPairs, step: int, *, seed: int) -> Row:
        """The step-th step (from 0), whose draws are keyed to (seed, step); its measurements.

        Of several processes each takes its share of the batch, and all make the same step.
        One whose loss or gradient is not finite changes nothing and has none; TrainingError after too many of them.
        """
        self.model.train()
        generator = Generator().manual_seed(epoch_seed(seed, step))
        index = torch.randint(len(pairs), (self.config.batch_size,), generator=generator)
        t = self.times(len(index), generator)
        measured = self._accumulate(pairs, index, t, generator)
        norm = self.updater.clip_gradient()
        row = {**distributed.add_up(measured), "grad_norm": norm.item()}
        self._no_gradient.see(row["grad_norm"] == 0)
        rate = self.config.learning_rate * self._rate_share(step)
        if not self.updater.step(row["loss"], row["grad_norm"], learning_rate=rate):
            return None
        return {**row, "logit_scale": self.logit_scale.exp().item()}

    def _accumulate(self, pairs: LabelledPairs, index: Tensor, t: Tensor, generator: Generator) -> dict[str, float]:
        """Add up the gradients of this process's share of a batch, in micro-batches; its part of the measurements.

        The pairs of a micro-batch are of one bucket. The share is weighted, so this changes no result.
        """
        share = distributed.share(len(index))
        weight = pairs.weight[index]
        micro_batches: list[tuple[Tensor, Tensor, float]] = []  # places, noise, share of the loss
        for places in pairs.by_bucket(index):
            noise = self.noise(pairs, index[places], generator)  # of all processes, so that each draws the same
            own = ((places >= share.start) & (places < share.stop)).nonzero().flatten()
            for some in own.split(self.config.micro_batch_size or max(1, len(own))):
                part = float(weight[places[some]].sum() / weight.sum())
                if len(some) and part != 0:
                    micro_batches.append((places[some], noise[some], part))
        measured: dict[str, float] = {}
        for i, (rows, noise, part) in enumerate(micro_batches, 1):
            scores = self.scores(pairs, index[rows], t[rows], noise)
            device = scores.device
            loss = preference_loss(scores, pairs.label[index[rows]].to(device), weight[rows].to(device))
            self.updater.backward(loss.value * part, last=i == len(micro_batches))
            for name, value in (("loss", loss.value), ("accuracy", loss.metrics["accuracy"])):
                measured[name] = measured.get(name, 0.0) + value.item() * part
        return measured

    def _rate_share(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        if self.config.schedule == "constant":
            return warm
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.config.steps)))

    @torch.no_grad()
    def accuracy(self, pairs: LabelledPairs, timestep: int, *, seed: int) -> tuple[float, int]:
        """Share of the decided pairs that the model orders as labelled at `timestep`, and how many they are.

        At t = 0 the images themselves are scored, as in the published evaluation of the pixel model.
        """
        generator = Generator().manual_seed(seed)
        self.model.eval()
        scores = torch.empty(len(pairs), 2)
        t = torch.full((len(pairs),), timestep)
        for batch in torch.arange(len(pairs)).split(self.config.batch_size):
            for places in pairs.by_bucket(batch):
                noise = self.noise(pairs, batch[places], generator)
                for some in torch.arange(len(places)).split(self.config.micro_batch_size or len(places)):
                    index = batch[places[some]]
                    found = self.scores(pairs, index, t[index], noise[some], clean=timestep == 0)
                    scores[index] = found.float().cpu()
        return pairwise_accuracy(scores, pairs.label)
