"""Training of the step-aware preference model (arXiv 2406.04314, section 4.1).

The two images of a pair are noised to one random timestep with the SAME noise; the frozen base predicts the x_0 of each
with guidance; the preference model scores the decoded x_0 at that timestep. So it learns to tell, in the middle of
sampling, which of two paths will end in the better image. Below float32 it computes under autocast; its weights stay
float32.
"""

import math

import torch
from torch import Generator, Tensor

from spo.config import SafetyConfig, TrainPreferenceConfig
from spo.core.losses import preference_loss
from spo.core.noise import epoch_seed
from spo.core.types import Conditioning, LabelledPairs
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.checkpoint import PreferenceModel
from spo.preference.labels import pairwise_accuracy
from spo.preference.repository import tokenize
from spo.runtime import distributed
from spo.training.guards import FiniteGuard, Streak
from spo.training.updates import Updater

REMEDY = "lower train_preference.learning_rate, set max_grad_norm, or train in float32 or bfloat16"


class StepAwareTraining:
    """The frozen base, which predicts the images of a pair at timestep t, and the preference model that is trained."""

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
        self.dtype = getattr(torch, config.dtype)
        self.updater = Updater(
            torch.optim.AdamW(self.model.parameters(), weight_decay=config.weight_decay),
            FiniteGuard(safety.max_skipped_in_a_row, REMEDY),
            dtype=self.dtype,
            max_grad_norm=config.max_grad_norm,
        )
        self._no_gradient = Streak(
            safety.stuck_after,
            "for {n} steps the preference model has had no gradient; its scores do not differ between the images of a "
            "pair: look at the pairs' images, and at train_preference.start_from",
        )

    def step(self, pairs: LabelledPairs, step: int, *, seed: int) -> dict[str, float] | None:
        """Make step number `step` (from 0) with draws keyed to (seed, step); its measurements, or None if skipped.

        Each process takes its share of the batch, and all make the same step. TrainingError after too many bad steps.
        """
        self.model.train()
        generator = Generator().manual_seed(epoch_seed(seed, step))
        index = torch.randint(len(pairs), (self.config.batch_size,), generator=generator)
        t = torch.randint(self.base.sampler.schedule.num_timesteps, (len(index),), generator=generator)
        noise = self.noise(pairs, index, generator)
        shard = distributed.share(len(index))
        measured = {}
        if len(index[shard]):
            weight = pairs.weight[index]
            part = float(weight[shard].sum() / weight.sum())  # this process's share of the batch
            scores = self.scores(pairs, index[shard], t[shard], noise[shard])
            device = scores.device
            loss = preference_loss(scores, pairs.label[index[shard]].to(device), weight[shard].to(device))
            self.updater.backward(loss.value * part)
            measured = {"loss": loss.value.item() * part, "accuracy": loss.metrics["accuracy"].item() * part}
        norm = self.updater.clip_gradient()
        row = {**distributed.add_up(measured), "grad_norm": norm.item()}
        self._no_gradient.see(row["grad_norm"] == 0)
        rate = self.config.learning_rate * self._rate_share(step)
        if not self.updater.step(row["loss"], row["grad_norm"], learning_rate=rate):
            return None
        return {**row, "logit_scale": self.model.clip.logit_scale.exp().item()}

    def _rate_share(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        if self.config.schedule == "constant":
            return warm
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.config.steps)))

    def noise(self, pairs: LabelledPairs, index: Tensor, generator: Generator) -> Tensor:
        """Standard normal (n, 1, c, h, w) for the pairs at `index` (n,): one for both images."""
        return torch.randn(len(index), 1, *pairs.latents.shape[2:], generator=generator)

    def scores(self, pairs: LabelledPairs, index: Tensor, t: Tensor, noise: Tensor, *, clean: bool = False) -> Tensor:
        """Scores (n, 2) of the pairs at `index` (n,), noised to timesteps t (n,); one UNet call for both images.

        clean: score the images as they are, like the end of a rollout at t = 0.
        """
        latents = pairs.latents[index]
        captions = [pairs.captions[i] for i in index.tolist()]
        if clean:
            images = self.base.decode(latents.flatten(0, 1).to(self.base.device))  # (2 n, 3, H, W)
        else:
            images = self.views(latents, noise.expand_as(latents), t, self.base.encode(captions))
        tokens = tokenize(self.preference.tokenizer, captions, self.model.clip.config).to(self.base.device)
        given_t = torch.zeros_like(t) if self.config.blind else t
        given_t = given_t.repeat_interleave(2).to(self.base.device)
        pixels = self.preference.preprocess(images)
        with torch.autocast(self.base.device.type, self.dtype, enabled=self.dtype != torch.float32):
            text = self.model.text_features(tokens).repeat_interleave(2, dim=0)
            features = self.model.image_features(pixels, given_t)
        return self.model.score(features, text).unflatten(0, (-1, 2))

    @torch.no_grad()
    def views(self, latents: Tensor, noise: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Images (n * 2, 3, H, W) in [0, 1] of the x_0 predicted from latents (n, 2, ...) noised to t (n,)."""
        device = self.base.device
        t = t.repeat_interleave(2).to(device)
        x_t = self.base.sampler.add_noise(latents.flatten(0, 1).to(device), noise.flatten(0, 1).to(device), t)
        output = self.base.predict(x_t, t, cond.repeat_interleave(2))
        return self.base.decode(self.base.sampler.predict_x_0(output, x_t, t))

    @torch.no_grad()
    def accuracy(self, pairs: LabelledPairs, timestep: int, *, seed: int) -> tuple[float, int]:
        """Share of the decided pairs that the model orders as labelled at `timestep`, and the number of those pairs.

        At t = 0 the images themselves are scored, as in the published evaluation.
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
        return pairwise_accuracy(torch.cat(parts).cpu(), pairs.label)
