"""Training the latent preference model (LPO, arXiv 2502.01051; published code Kwai-Kolors/LPO).

A pair's two latents are noised to one random time, and the model scores them as they are: no pass of the base, no
decoder. All of the model trains, the text encoders too. The published settings: t in {1, 51, ..., 951}; noise of its
own for each image; 4000 steps of 128 pairs at 1e-5 with 500 of warm-up for SD v1.5, 8000 of 32 with 1000 for SDXL;
weight decay .3; gradients clipped at 1, in bfloat16.

Departures: noise may be one for both images of a pair, as in SPO. Times may be uniform over all timesteps. At t = 0, at
which sampling ends, clean latents are scored; the published validation scores them at t = 1.
"""

from typing import Literal

import torch
from torch import Generator, Tensor

from spo.config import SafetyConfig, TrainPreferenceConfig
from spo.core.types import LabelledPairs
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.latent_checkpoint import LatentPreference
from spo.training.preference_steps import PreferenceTraining

NoisePer = Literal["image", "pair"]


class LatentPreferenceTraining(PreferenceTraining):
    """The base, whose schedule noises the pairs, and the model that learns to score them.

    noise_per: whether the two images of a pair have noise of their own, as published, or share it.
    grid: (T,) times that are drawn from, on any device; None for all timesteps of the schedule.
    micro_batch_size: as in PreferenceTraining.
    ModelError where the model reads the latents of another autoencoder than the base's.
    """

    no_gradient_remedy = "the pairs' images, and at the model that training started from"

    def __init__(
        self,
        base: LatentDiffusion,
        preference: LatentPreference,
        config: TrainPreferenceConfig,
        safety: SafetyConfig | None = None,
        *,
        noise_per: NoisePer = "image",
        grid: Tensor | None = None,
        micro_batch_size: int | None = None,
    ):
        if noise_per not in ("image", "pair"):
            raise ValueError(f"noise_per={noise_per!r} is unknown; use image or pair")
        preference.check_autoencoder(base.autoencoder.vae)
        super().__init__(base, preference.model, config, safety, micro_batch_size=micro_batch_size)
        self.preference = preference
        self.noise_per = noise_per
        self.grid = torch.arange(base.sampler.schedule.num_timesteps) if grid is None else grid.cpu()

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def times(self, n: int, generator: Generator) -> Tensor:
        """Uniform over the grid (n,)."""
        return self.grid[torch.randint(len(self.grid), (n,), generator=generator)]

    def noise(self, pairs: LabelledPairs, index: Tensor, generator: Generator) -> Tensor:
        """Standard normal (n, 2, c, h, w) for the pairs at `index` (n,), or (n, 1, c, h, w) for both images."""
        images = 2 if self.noise_per == "image" else 1
        return torch.randn(len(index), images, *pairs.latents.shape[2:], generator=generator)

    def scores(self, pairs: LabelledPairs, index: Tensor, t: Tensor, noise: Tensor, *, clean: bool = False) -> Tensor:
        """Scores (n, 2) of the pairs at `index` (n,), noised to times t (n,); a prompt is encoded once for both images.

        clean: score the latents without noise, as the end of a rollout is scored at t = 0.
        """
        device = self.base.device
        latents = pairs.latents[index].to(device)  # (n, 2, c, h, w)
        t = t.to(device).repeat_interleave(2)
        x_t = latents.flatten(0, 1)
        if not clean:
            x_t = self.base.sampler.add_noise(x_t, noise.to(device).expand_as(latents).flatten(0, 1), t)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            text = self.preference.encode([pairs.captions[i] for i in index.tolist()])
            return self.model.score(x_t.float(), t, text.repeat_interleave(2)).unflatten(0, (-1, 2))
