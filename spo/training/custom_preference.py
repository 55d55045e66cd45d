"""A preference model that is the user's own class: measured as the trained kinds are, and never trained."""

from pathlib import Path
from typing import Self

import torch
from torch import Generator, Tensor

from spo.config import Config, CustomPreferenceConfig
from spo.core.types import LabelledPairs
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.labels import pairwise_accuracy
from spo.preference.reward import RewardScorer, make_reward, save_reward
from spo.training.preference import predicted_images
from spo.workspace import Workspace


class CustomPreference:
    """The base, which predicts the images of a pair, and the class that scores them."""

    skipped = 0  # updates

    def __init__(self, base: LatentDiffusion, config: CustomPreferenceConfig, modules: Path):
        self.base = base
        self.config = config
        self.modules = modules
        self._scorer = make_reward(config.class_name, config.options, modules)

    @classmethod
    def start(cls, base: LatentDiffusion, config: Config, name: str) -> Self:
        """The preference model `name`; ModelError if its class cannot be made."""
        settings = config.preference_models[name]
        assert isinstance(settings, CustomPreferenceConfig)
        return cls(base, settings, Workspace(config).scorers)

    def save(self, folder: Path) -> None:
        """Write the model's folder, with the code that it needs."""
        save_reward(self.config.class_name, self.config.options, self.modules, folder)

    def scorer(self) -> RewardScorer:
        return self._scorer

    @torch.no_grad()
    def accuracy(self, pairs: LabelledPairs, timestep: int, *, seed: int) -> tuple[float, int]:
        """As PreferenceTraining's: the share of the decided pairs ordered as labelled, and how many they are."""
        generator = Generator().manual_seed(seed)
        scores = torch.empty(len(pairs), 2)
        batches = torch.arange(len(pairs)).split(self.config.batch_size)
        for index in (batch[places] for batch in batches for places in pairs.by_bucket(batch)):
            latents, captions = pairs.latents(index), [pairs.captions[i] for i in index.tolist()]
            images = self._images(latents, captions, timestep, generator)
            both = [caption for caption in captions for _ in range(2)]
            found = self._scorer.score_images(images, both, torch.tensor(timestep))
            scores[index] = found.unflatten(0, (-1, 2)).float().cpu()
        return pairwise_accuracy(scores, pairs.label)

    def _images(self, latents: Tensor, captions: list[str], timestep: int, generator: Generator) -> Tensor:
        """Images (2 n, 3, H, W) predicted from latents (n, 2, c, h, w) noised to a timestep; at t = 0 their own."""
        noise = torch.randn(len(latents), 1, *latents.shape[2:], generator=generator).expand_as(latents)
        if timestep == 0:
            return self.base.decode(latents.flatten(0, 1).to(self.base.device))
        t = torch.full((len(latents),), timestep)
        return predicted_images(self.base, latents, noise, t, self.base.encode(captions))
