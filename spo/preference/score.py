"""Scores of candidates by the preference model: a core.types.Scorer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spo.core.types import Candidates
from spo.preference.checkpoint import PreferenceModel
from spo.preference.pixel import Modulations
from spo.preference.repository import tokenize


class PreferenceScorer:
    """Scores of images by a preference model, without gradients; higher is better.

    A `dtype` below float32 runs under autocast; weights are not changed, and features and scores are float32.
    The modulations of a timestep are cached, so the model must not be trained meanwhile; the published code computes
    them and the text features anew at every step. If `timestep` is given, the model gets it instead of every t, so it
    is blind to t (the paper's ablation).
    """

    def __init__(
        self,
        preference: PreferenceModel,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        timestep: int | None = None,
    ):
        self.device = torch.device(device)
        self.model = preference.model.to(self.device).eval()
        self.tokenizer = preference.tokenizer
        self.preprocess = preference.preprocess
        self.timestep = timestep
        self._modulations: dict[int, Modulations] = {}
        self._precision: dict[str, Any] = {
            "device_type": self.device.type,
            "dtype": dtype,
            "enabled": dtype != torch.float32,
        }

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text features (b, d); prompts longer than the model's context are cut."""
        tokens = tokenize(self.tokenizer, prompts, self.model.clip.config)
        with torch.autocast(**self._precision):
            return self.model.text_features(tokens.to(self.device))

    def __call__(self, candidates: Candidates) -> Tensor:
        """Scores (k, b) of candidates by their decoded x_0; their `text` is the result of `encode`."""
        images, k = candidates.images, len(candidates.x)
        t = torch.tensor(candidates.t)  # on the CPU, where reading it does not wait for a GPU
        return self.score_images(images.flatten(0, 1), candidates.text.repeat(k, 1), t).unflatten(0, (k, -1))

    @torch.no_grad()
    def score_images(self, images: Tensor, text: Tensor, t: Tensor) -> Tensor:
        """Scores (n,) of images (n, 3, H, W) in [0, 1] for text features (n, d) at timesteps t (n,), or () for all."""
        if self.timestep is not None:
            t = torch.full_like(t, self.timestep)
        pixels = self.preprocess(images.to(self.device))
        with torch.autocast(**self._precision):
            if t.ndim:
                features = self.model.image_features(pixels, t.to(self.device))
            else:
                features = self.model.modulated_features(pixels, self._modulations_at(int(t)))
        return self.model.score(features, text.to(self.device))

    def _modulations_at(self, t: int) -> Modulations:
        if t not in self._modulations:
            self._modulations[t] = self.model.modulations(torch.tensor([t], device=self.device))
        return self._modulations[t]
