"""Training the latent preference model (LPO, arXiv 2502.01051; published code Kwai-Kolors/LPO).

A pair's two latents are noised to one random time, and the model scores them as they are: no pass of the base, no
decoder. All of the model trains, the text encoders too. The published settings: t in {1, 51, ..., 951}; noise of its
own for each image; 4000 steps of 128 pairs at 1e-5 with 500 of warm-up for SD v1.5, 8000 of 32 with 1000 for SDXL;
weight decay .3; gradients clipped at 1, in bfloat16.

Departures: noise may be one for both images of a pair, as in SPO. Times may be all but 0. At t = 0, at
which sampling ends, clean latents are scored; the published validation scores them at t = 1.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Generator, Tensor

from spo.config import Config, LatentPreferenceConfig, ModelConfig, SafetyConfig
from spo.core.types import LabelledPairs
from spo.errors import ModelError
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.network import Network
from spo.preference.checkpoint import read_settings
from spo.preference.latent_checkpoint import LatentPreference, load_latent_preference
from spo.preference.latent_published import read_published_latent
from spo.preference.latent_score import LatentScorer
from spo.preference.latent_transformer import TransformerPreference
from spo.preference.repository import read_clip
from spo.training.preference_steps import PreferenceTraining


def load_latent(folder: Path, network: Network, model: ModelConfig) -> LatentPreference | TransformerPreference:
    """A latent preference model from our folder, for the base's family; ModelError if it is of another one."""
    if not model.is_flow:
        return load_latent_preference(folder)
    values = read_settings(folder, kind="latent")
    if (found := values.get("family")) != model.family:
        raise ModelError(f"{folder} holds a preference model of family {found}, not of {model.family}")
    return TransformerPreference.load(folder, values, network)


class LatentPreferenceTraining(PreferenceTraining):
    """The base, whose schedule noises the pairs, and the model that learns to score them.

    ModelError where the model reads the latents of another autoencoder than the base's.
    """

    no_gradient_remedy = "the pairs' images, and at the model that training started from"
    config: LatentPreferenceConfig

    def __init__(
        self,
        base: LatentDiffusion,
        preference: LatentPreference | TransformerPreference,
        config: LatentPreferenceConfig,
        safety: SafetyConfig | None = None,
    ):
        preference.check_autoencoder(base.autoencoder.vae)
        super().__init__(base, preference.model, config, safety)
        self.preference = preference
        self.grid = torch.arange(1, base.sampler.schedule.num_timesteps, config.timestep_stride)

    @classmethod
    def start(cls, base: LatentDiffusion, config: Config, name: str) -> Self:
        settings = config.preference_models[name]
        assert isinstance(settings, LatentPreferenceConfig)
        preference: LatentPreference | TransformerPreference
        if config.model.is_flow and settings.checkpoint is None:
            preference = TransformerPreference.from_network(
                base.network,
                family=config.model.family,
                vae=base.autoencoder.vae,
                layers=settings.layers,
                projection_size=settings.projection_size,
                guidance_scale=settings.guidance_scale,
                generator=Generator().manual_seed(config.seed),
            )
        elif settings.checkpoint is None:
            projection = settings.text_projection and read_clip(settings.text_projection).text_projection.weight.data
            preference = LatentPreference.from_pipeline(
                base.network.pipeline,
                vae=base.autoencoder.vae,
                projection_size=settings.projection_size,
                guidance_scale=settings.guidance_scale,
                text_projection=projection,
                generator=Generator().manual_seed(config.seed),
            )
        elif settings.checkpoint_base is None:
            preference = load_latent(Path(settings.checkpoint), base.network, config.model)
        else:
            preference = read_published_latent(
                settings.checkpoint, settings.checkpoint_base, guidance_scale=settings.guidance_scale
            )
        if config.model.gradient_checkpointing:
            preference.model.enable_gradient_checkpointing()
        return cls(base, preference, settings, config.safety)

    def save(self, folder: Path) -> None:
        self.preference.save(folder)

    def scorer(self) -> LatentScorer:
        return LatentScorer(self.preference, device=self.base.device, autoencoder=self.base.autoencoder)

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def times(self, n: int, generator: Generator) -> Tensor:
        """Uniform over the grid (n,)."""
        return self.grid[torch.randint(len(self.grid), (n,), generator=generator)]

    def noise(self, pairs: LabelledPairs, index: Tensor, generator: Generator) -> Tensor:
        """Standard normal (n, 2, c, h, w) for the pairs at `index` (n,), or (n, 1, c, h, w) for both images."""
        images = 2 if self.config.noise_per == "image" else 1
        return torch.randn(len(index), images, *pairs.latent_shape(index), generator=generator)

    def scores(self, pairs: LabelledPairs, index: Tensor, t: Tensor, noise: Tensor, *, clean: bool = False) -> Tensor:
        """Scores (n, 2) of the pairs at `index` (n,), noised to times t (n,); a prompt is encoded once for both images.

        clean: score the latents without noise, as the end of a rollout is scored at t = 0.
        """
        device = self.base.device
        latents = pairs.latents(index).to(device)  # (n, 2, c, h, w)
        t = t.to(device).repeat_interleave(2)
        x_t = latents.flatten(0, 1)
        if not clean:
            x_t = self.base.sampler.add_noise(x_t, noise.to(device).expand_as(latents).flatten(0, 1), t)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            text = self.preference.encode([pairs.captions[i] for i in index.tolist()])
            return self.model.score(x_t.float(), t, text.repeat_interleave(2)).unflatten(0, (-1, 2))
