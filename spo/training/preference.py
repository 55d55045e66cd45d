"""Training the step-aware preference model (arXiv 2406.04314, section 4.1).

A pair's two images are noised to one random timestep with the SAME noise; the frozen base predicts the x_0 of each
with guidance; decoded, they are what the model judges at that timestep. So it learns to tell, half-way through
sampling, which of two paths will end in the better image. Below float32 it computes under autocast; its weights are
float32.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Generator, Tensor

from spo.config import SafetyConfig, TrainPreferenceConfig
from spo.core.losses import preference_loss
from spo.core.noise import epoch_seed
from spo.core.types import Conditioning, LabelledPairs
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.accuracy import pairwise_accuracy
from spo.preference.checkpoint import PreferenceModel
from spo.runtime import distributed
from spo.runtime.checkpoint import pack_optimizer, unpack_optimizer
from spo.training.guards import FiniteGuard, Streak
from spo.training.scaling import LossScale

Row = dict[str, float] | None  # a step's measurements, where it was made


class StepAwareTraining:
    """The base, which shows what a pair looks like from timestep t, and the model that is to judge it."""

    def __init__(
        self,
        base: LatentDiffusion,
        preference: PreferenceModel,
        config: TrainPreferenceConfig,
        safety: SafetyConfig | None = None,
    ):
        safety = safety or SafetyConfig()
        self.base = base
        self.preference = preference
        self.model = preference.model.to(base.device)
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
            "pair: look at the pairs' images, and at train_preference.start_from",
        )

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
        t = torch.randint(self.base.sampler.schedule.num_timesteps, (len(index),), generator=generator)
        noise = self.noise(pairs, index, generator)
        optimizer.zero_grad()
        mine = distributed.share(len(index))
        measured = {}
        if len(index[mine]):
            weight = pairs.weight[index]
            part = float(weight[mine].sum() / weight.sum())  # of the batch, that is this process's
            scores = self.scores(pairs, index[mine], t[mine], noise[mine])
            device = scores.device
            loss = preference_loss(scores, pairs.label[index[mine]].to(device), weight[mine].to(device))
            self.scale.scale(loss.value * part).backward()
            measured = {"loss": loss.value.item() * part, "accuracy": loss.metrics["accuracy"].item() * part}
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
        return {**row, "logit_scale": self.model.clip.logit_scale.exp().item()}

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

    def noise(self, pairs: LabelledPairs, index: Tensor, generator: Generator) -> Tensor:
        """Standard normal (n, 1, c, h, w) for the pairs at `index` (n,): one for both images."""
        return torch.randn(len(index), 1, *pairs.latents.shape[2:], generator=generator)

    def scores(self, pairs: LabelledPairs, index: Tensor, t: Tensor, noise: Tensor, *, clean: bool = False) -> Tensor:
        """Scores (n, 2) of the pairs at `index` (n,), noised to timesteps t (n,); one UNet call for both images.

        clean: judge the images as they are, as the end of a rollout is judged at t = 0.
        """
        latents = pairs.latents[index]
        captions = [pairs.captions[i] for i in index.tolist()]
        if clean:
            images = self.base.decode(latents.flatten(0, 1).to(self.base.device))  # (2 n, 3, H, W)
        else:
            images = self.views(latents, noise.expand_as(latents), t, self.base.encode(captions))
        tokens = self.preference.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.model.clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids.to(self.base.device)
        given_t = torch.zeros_like(t) if self.config.blind else t
        given_t = given_t.repeat_interleave(2).to(self.base.device)
        pixels = self.preference.preprocess(images)
        with torch.autocast(self.base.device.type, self.dtype, enabled=self.dtype != torch.float32):
            text = self.model.text_features(tokens).repeat_interleave(2, dim=0)
            features = self.model.image_features(pixels, given_t)
        return self.model.score(features, text).unflatten(0, (-1, 2))

    @torch.no_grad()
    def views(self, latents: Tensor, noise: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Images (n * 2, 3, H, W) in [0, 1]: the x_0 predicted from latents (n, 2, ...) noised to t (n,)."""
        device = self.base.device
        t = t.repeat_interleave(2).to(device)
        x_t = self.base.sampler.add_noise(latents.flatten(0, 1).to(device), noise.flatten(0, 1).to(device), t)
        output = self.base.predict(x_t, t, cond.repeat_interleave(2))
        return self.base.decode(self.base.sampler.predict_x_0(output, x_t, t))

    @torch.no_grad()
    def accuracy(self, pairs: LabelledPairs, timestep: int, *, seed: int) -> tuple[float, int]:
        """Share of the decided pairs that the model judges as labelled from `timestep`, and how many they are.

        At t = 0 the images themselves are judged, as in the published evaluation.
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
