"""The steps that every kind of preference model trains by.

A kind says how the pairs look to it: `scores`, the noise and the times. All else is here: batches keyed to (seed,
step), shares of several processes, micro-batches, the loss scale, what is skipped, and the state of a run.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from spo.config import Config, SafetyConfig, TrainPreferenceConfig
from spo.core.losses import preference_loss
from spo.core.noise import epoch_seed
from spo.core.types import LabelledPairs
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.accuracy import pairwise_accuracy
from spo.runtime import distributed
from spo.runtime.checkpoint import pack_optimizer, unpack_optimizer
from spo.training.guards import FiniteGuard, Streak
from spo.training.scaling import LossScale

Row = dict[str, float] | None  # a step's measurements, where it was made


class PreferenceTraining(ABC):
    """A preference model that trains on pairs of the base's latents."""

    blind_mend: ClassVar[str]  # where to look when there has been no gradient for long

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
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.dtype = getattr(torch, config.dtype)
        self.scale = LossScale.of(self.dtype)
        self.guard = FiniteGuard(safety.max_skipped_in_a_row)
        self._blind = Streak(
            safety.stuck_after,
            "for {n} steps the preference model has had no gradient; its scores do not differ between the images of a "
            f"pair: look at {self.blind_mend}",
        )

    @classmethod
    @abstractmethod
    def start(cls, base: LatentDiffusion, config: Config) -> Self:
        """The training of config.train_preference at its start, or around its `checkpoint`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model's folder."""

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
        config, optimizer = self.config, self.optimizer
        generator = Generator().manual_seed(epoch_seed(seed, step))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * self._schedule(step)
        index = torch.randint(len(pairs), (config.batch_size,), generator=generator)
        t = self.times(len(index), generator)
        noise = self.noise(pairs, index, generator)
        optimizer.zero_grad()
        measured = self._accumulate(pairs, index, t, noise)
        distributed.sum_gradients(self.model.parameters())
        self.scale.unscale(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm or float("inf"))
        row = {**distributed.add_up(measured), "grad_norm": norm.item()}
        if math.isfinite(row["loss"]) and self.scale.overflowed(math.isfinite(row["grad_norm"])):
            return None
        self._blind.see(row["grad_norm"] == 0)
        if not self.guard.allows(
            row["loss"],
            row["grad_norm"],
            mend="lower train_preference.learning_rate, set max_grad_norm, or train in float32 or bfloat16",
        ):
            return None
        optimizer.step()
        return {**row, "logit_scale": self.logit_scale.exp().item()}

    def _accumulate(self, pairs: LabelledPairs, index: Tensor, t: Tensor, noise: Tensor) -> dict[str, float]:
        """Add up the gradients of this process's share of a batch, in micro-batches; its part of the measurements."""
        share = torch.arange(len(index))[distributed.share(len(index))]
        weight = pairs.weight[index]
        measured: dict[str, float] = {}
        for rows in share.split(self.config.micro_batch_size or max(1, len(share))):
            part = float(weight[rows].sum() / weight.sum())  # of the batch, that is in these rows
            if not len(rows) or part == 0:
                continue
            scores = self.scores(pairs, index[rows], t[rows], noise[rows])
            device = scores.device
            loss = preference_loss(scores, pairs.label[index[rows]].to(device), weight[rows].to(device))
            self.scale.scale(loss.value * part).backward()
            for name, value in (("loss", loss.value), ("accuracy", loss.metrics["accuracy"])):
                measured[name] = measured.get(name, 0.0) + value.item() * part
        return measured

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What training has changed: tensors, and what is none."""
        tensors, numbers = pack_optimizer(self.optimizer)
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        values = {"optimizer": numbers, "skipped": self.guard.skipped, "scale": asdict(self.scale)}
        return {**model, **tensors}, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        model = {name: tensors[f"model.{name}"] for name in self.model.state_dict()}
        self.model.load_state_dict(model)
        unpack_optimizer(self.optimizer, tensors, values["optimizer"])
        self.guard.skipped = values["skipped"]
        self.scale = LossScale(**values["scale"])

    def _schedule(self, step: int) -> float:
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
        parts = [
            self.scores(
                pairs,
                index,
                torch.full((len(index),), timestep),
                self.noise(pairs, index, generator),
                clean=timestep == 0,
            )
            for index in torch.arange(len(pairs)).split(self.config.batch_size)
        ]
        result = pairwise_accuracy(torch.cat(parts).cpu(), pairs.label)
        return result.accuracy, result.num_pairs
