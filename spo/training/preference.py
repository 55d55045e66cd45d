"""Training of the step-aware preference model (arXiv 2406.04314, section 4.1).

The two images of a pair are noised to one random timestep with the SAME noise; the frozen base predicts the x_0 of each
with guidance; the preference model scores the decoded x_0 at that timestep. So it learns to tell, in the middle of
sampling, which of two paths will end in the better image. Below float32 it computes under autocast; its weights stay
float32.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Generator, Tensor

from spo.config import Config, PixelPreferenceConfig, SafetyConfig
from spo.core.types import Conditioning, LabelledPairs
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.checkpoint import PreferenceModel, load_clip, load_preference_model, save_preference_model
from spo.preference.repository import tokenize
from spo.preference.score import PreferenceScorer
from spo.training.preference_steps import PreferenceTraining


class StepAwareTraining(PreferenceTraining):
    """The frozen base, which predicts the images of a pair at timestep t, and the preference model that is trained."""

    no_gradient_remedy = "the pairs' images, and at its start_from"
    config: PixelPreferenceConfig

    def __init__(
        self,
        base: LatentDiffusion,
        preference: PreferenceModel,
        config: PixelPreferenceConfig,
        safety: SafetyConfig | None = None,
    ):
        super().__init__(base, preference.model, config, safety)
        self.preference = preference

    @classmethod
    def start(cls, base: LatentDiffusion, config: Config, name: str) -> Self:
        settings = config.preference_models[name]
        assert isinstance(settings, PixelPreferenceConfig)
        if settings.checkpoint is not None:
            preference = load_preference_model(settings.checkpoint)
        else:
            preference = load_clip(
                settings.start_from,
                processor=settings.processor,
                preprocessing=settings.preprocessing,
                generator=Generator().manual_seed(config.seed),
            )
        if config.model.gradient_checkpointing:
            preference.model.enable_gradient_checkpointing()
        return cls(base, preference, settings, config.safety)

    def save(self, folder: Path) -> None:
        save_preference_model(self.model, self.preference.tokenizer, self.preference.preprocess, folder)

    def scorer(self) -> PreferenceScorer:
        timestep = 0 if self.config.blind else None
        return PreferenceScorer(self.preference, device=self.base.device, timestep=timestep)

    @property
    def logit_scale(self) -> Tensor:
        return self.model.clip.logit_scale

    def times(self, n: int, generator: Generator) -> Tensor:
        """Uniform over all timesteps (n,)."""
        return torch.randint(self.base.sampler.schedule.num_timesteps, (n,), generator=generator)

    def noise(self, pairs: LabelledPairs, index: Tensor, generator: Generator) -> Tensor:
        """Standard normal (n, 1, c, h, w) for the pairs at `index` (n,): one for both images."""
        return torch.randn(len(index), 1, *pairs.latent_shape(index), generator=generator)

    def scores(self, pairs: LabelledPairs, index: Tensor, t: Tensor, noise: Tensor, *, clean: bool = False) -> Tensor:
        """Scores (n, 2) of the pairs at `index` (n,), noised to timesteps t (n,); one UNet call for both images.

        clean: score the images as they are, like the end of a rollout at t = 0.
        """
        latents = pairs.latents(index)
        captions = [pairs.captions[i] for i in index.tolist()]
        if clean:
            images = self.base.decode(latents.flatten(0, 1).to(self.base.device))  # (2 n, 3, H, W)
        else:
            images = predicted_images(self.base, latents, noise.expand_as(latents), t, self.base.encode(captions))
        tokens = tokenize(self.preference.tokenizer, captions, self.model.clip.config).to(self.base.device)
        given_t = torch.zeros_like(t) if self.config.blind else t
        given_t = given_t.repeat_interleave(2).to(self.base.device)
        pixels = self.preference.preprocess(images)
        with torch.autocast(self.base.device.type, self.dtype, enabled=self.dtype != torch.float32):
            text = self.model.text_features(tokens).repeat_interleave(2, dim=0)
            features = self.model.image_features(pixels, given_t)
        return self.model.score(features, text).unflatten(0, (-1, 2))


@torch.no_grad()
def predicted_images(base: LatentDiffusion, latents: Tensor, noise: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Images (n * 2, 3, H, W) in [0, 1] of the x_0 predicted from latents (n, 2, ...) noised to t (n,)."""
    t = t.repeat_interleave(2).to(base.device)
    x_t = base.sampler.add_noise(latents.flatten(0, 1).to(base.device), noise.flatten(0, 1).to(base.device), t)
    output = base.predict(x_t, t, cond.repeat_interleave(2))
    return base.decode(base.sampler.predict_x_0(output, x_t, t))
