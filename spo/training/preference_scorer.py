"""A preference model that `train_preference` left, as the scorer of candidates."""

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spo.config import Config, CustomPreferenceConfig, PixelPreferenceConfig, ScoringConfig
from spo.core.types import Scorer
from spo.errors import ConfigError
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.checkpoint import PreferenceModel, load_preference_model, read_settings
from spo.preference.latent_checkpoint import LatentPreference
from spo.preference.latent_score import LatentScorer
from spo.preference.latent_transformer import TransformerPreference
from spo.preference.reward import RewardScorer, load_reward
from spo.preference.score import PreferenceScorer
from spo.runtime import distributed
from spo.training.latent_preference import load_latent
from spo.workspace import Workspace


class ImageScorer(Scorer, Protocol):
    """A scorer of candidates that also takes images."""

    def score_images(self, images: Tensor, text: Any, t: Tensor) -> Tensor:
        """Scores (n,) of images (n, 3, H, W) in [0, 1] for what `encode` made of n prompts, at times t () or (n,)."""
        ...


@dataclass(frozen=True)
class LoadedPreference:
    """A preference model of the profile, in memory once however many scorers use it."""

    config: Config
    name: str
    root: Path
    policy: LatentDiffusion

    @cached_property
    def _model(self) -> PreferenceModel | LatentPreference | TransformerPreference | RewardScorer:
        preference, folder = self.config.preference_models[self.name], self._folder
        read_settings(folder, kind=preference.kind)
        if isinstance(preference, PixelPreferenceConfig):
            return load_preference_model(folder)
        if isinstance(preference, CustomPreferenceConfig):
            return load_reward(folder)
        latent = load_latent(folder, self.policy.network, self.config.model)
        if (note := latent.check_autoencoder(self.policy.autoencoder.vae)) and distributed.is_main():
            print(note, file=sys.stderr, flush=True)
        return latent

    @property
    def _folder(self) -> Path:
        return Workspace(self.config, self.root).preference_model(self.name)

    def scorer(self, scoring: ScoringConfig | None = None) -> ImageScorer:
        """A scorer by the model. A pixel model that was trained blind to t stays so.

        A latent one adds its passes to those of the policy's network. ModelError where the model is missing, of another
        kind than the profile's, or reads another autoencoder's latents.
        """
        preference, scoring = self.config.preference_models[self.name], scoring or ScoringConfig()
        if problem := preference.unfit(scoring):
            raise ConfigError(f"scoring.{problem}")
        model, policy = self._model, self.policy
        options: dict[str, Any] = {"device": policy.device, "dtype": getattr(torch, scoring.dtype)}
        if isinstance(model, RewardScorer):
            return model
        if isinstance(model, PreferenceModel):
            blind = isinstance(preference, PixelPreferenceConfig) and preference.blind
            return PreferenceScorer(model, timestep=0 if blind else scoring.timestep, **options)

        def count(forwards: float) -> None:
            policy.network.forwards += forwards

        options |= {"at_step_time": scoring.at_step_time, "autoencoder": policy.autoencoder, "count": count}
        return LatentScorer(model, **options)


def load_scorer(
    config: Config, name: str, root: Path, policy: LatentDiffusion, scoring: ScoringConfig | None = None
) -> ImageScorer:
    """The scorer by the preference model `name`, as in `LoadedPreference`."""
    return LoadedPreference(config, name, root, policy).scorer(scoring)
