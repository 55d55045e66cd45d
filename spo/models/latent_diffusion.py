"""A diffusion model as the core's `Denoiser`: a network, a sampler and an autoencoder."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.core.types import Conditioning, Transition
from spo.models.autoencoder import Autoencoder
from spo.models.network import Network
from spo.models.sampler import Sampler


@dataclass(frozen=True)
class LatentDiffusion:
    """Network, sampler and autoencoder of one model; each can be used alone."""

    network: Network
    sampler: Sampler
    autoencoder: Autoencoder

    @property
    def timesteps(self) -> Tensor:
        return self.sampler.timesteps

    @property
    def num_trainable(self) -> int:
        return self.sampler.num_trainable

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.network.latent_shape

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self.network.encode(prompts)

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.network.predict(x_t, t, cond, guidance_scale=self.sampler.guidance_scale)

    def transition(
        self, output: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor, *, eta: float | None = None
    ) -> Transition:
        return self.sampler.transition(output, x_t, t, t_prev, eta=eta)

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    def reference(self) -> AbstractContextManager[None]:
        return self.network.reference()

    def merged(self) -> AbstractContextManager[None]:
        return self.network.merged()
