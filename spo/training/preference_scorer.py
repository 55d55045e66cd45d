"""A preference model that `train_preference` left, as the scorer of candidates."""

import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spo.config import Config, CustomPreferenceConfig, PixelPreferenceConfig, ScoringConfig
from spo.core.types import Scorer
from spo.errors import ConfigError
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.checkpoint import load_preference_model, read_settings
from spo.preference.latent_score import LatentScorer
from spo.preference.reward import load_reward
from spo.preference.score import PreferenceScorer
from spo.runtime import distributed
from spo.training.latent_preference import load_latent
from spo.workspace import Workspace


class ImageScorer(Scorer, Protocol):
    """A scorer of candidates that also takes images."""

    def score_images(self, images: Tensor, text: Any, t: Tensor) -> Tensor:
        """Scores (n,) of images (n, 3, H, W) in [0, 1] for what `encode` made of n prompts, at times t () or (n,)."""
        ...


def load_scorer(
    config: Config, name: str, root: Path, policy: LatentDiffusion, scoring: ScoringConfig | None = None
) -> ImageScorer:
    """The scorer by the preference model `name`, whose folder must hold the profile's kind.

    A pixel model that was trained blind to t stays so. A latent one adds its passes to those of the policy's network.
    ModelError where the model is missing, of another kind than the profile's, or reads another autoencoder's latents.
    """
    preference, scoring = config.preference_models[name], scoring or ScoringConfig()
    folder, dtype = Workspace(config, root).preference_model(name), getattr(torch, scoring.dtype)
    read_settings(folder, kind=preference.kind)
    if problem := preference.unfit(scoring):
        raise ConfigError(f"scoring.{problem}")
    if isinstance(preference, PixelPreferenceConfig):
        timestep = 0 if preference.blind else scoring.timestep
        return PreferenceScorer(load_preference_model(folder), device=policy.device, dtype=dtype, timestep=timestep)
    if isinstance(preference, CustomPreferenceConfig):
        return load_reward(folder)
    latent = load_latent(folder, policy.network, config.model)
    if (note := latent.check_autoencoder(policy.autoencoder.vae)) and distributed.is_main():
        print(note, file=sys.stderr, flush=True)

    def count(forwards: float) -> None:
        policy.network.forwards += forwards

    return LatentScorer(
        latent,
        device=policy.device,
        dtype=dtype,
        at_step_time=scoring.at_step_time,
        autoencoder=policy.autoencoder,
        count=count,
    )
