"""The latent preference model in use: a core.types.Scorer that needs no pass of the policy and no decoder."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spo.core.types import Candidates, Conditioning
from spo.preference.latent_checkpoint import LatentPreference
from spo.preference.latent_transformer import TransformerPreference

POSITIONS = 32 * 64**2  # of the latents that go through at a time, both halves of the guidance counted


class LatentScorer:
    """Scores of noisy latents by a latent preference model, without gradients; higher is better.

    A `dtype` below float32 runs under autocast; the weights stay as they are, and scores are float32. Prompts are
    encoded once, the empty prompt once a call; the published code encodes both anew for every candidate.
    `at_step_time`: score candidates as if at the time from which the last step started, one grid step noisier than they
    are. So does the published sampler, although its model was trained on latents at the time that it gets.
    `autoencoder`: the policy's, which makes latents of images; its `encode` is all that is used of it.
    `count`: gets the forwards that candidates took, in those of whole networks; a pass of this half of one is half.
    `batch_size`: latents that go through at a time; None for as many as have 32 times 64 x 64 positions.
    """

    def __init__(
        self,
        preference: LatentPreference | TransformerPreference,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        at_step_time: bool = False,
        autoencoder: Any = None,
        count: Callable[[float], None] | None = None,
        batch_size: int | None = None,
    ):
        self.device = torch.device(device)
        self.preference = preference
        channels_last: dict[str, Any] = {"memory_format": torch.channels_last}  # faster convolutions
        self.model: Any = preference.model.eval().to(self.device).to(**channels_last)
        self.at_step_time = at_step_time
        self.autoencoder = autoencoder
        self.count = count
        self.batch_size = batch_size
        self._precision: dict[str, Any] = {
            "device_type": self.device.type,
            "dtype": dtype,
            "enabled": dtype != torch.float32,
        }

    @property
    def _passes(self) -> int:
        """Of a latent: one a prompt, and one for the empty prompt."""
        return 1 if self.model.guidance_scale == 1 else 2

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The b prompts as the model needs them; prompts longer than the encoders' context are cut."""
        with torch.autocast(**self._precision):
            return self.preference.encode(prompts)

    def __call__(self, candidates: Candidates) -> Tensor:
        """Scores (k, b) of the candidates' latents; their `text` is what `encode` gives."""
        k, b = candidates.x.shape[:2]
        t = candidates.t_from if self.at_step_time else candidates.t
        if t is None:
            raise ValueError("at_step_time needs candidates that know the time from which their step started (t_from)")
        rows = torch.arange(b, device=self.device).repeat(k)
        times = torch.full((k * b,), t, device=self.device)
        if self.count is not None:
            self.count(k * b * self._passes / 2)
        return self.score_latents(candidates.x.flatten(0, 1), times, candidates.text, rows=rows).unflatten(0, (k, b))

    def score_images(self, images: Tensor, text: Conditioning, t: Tensor) -> Tensor:
        """Scores (n,) of clean images (n, 3, H, W) in [0, 1] for n prompts at times t (n,), or () for all."""
        x = self.autoencoder.encode(images.to(self.device))
        return self.score_latents(x, t.expand(len(x)), text)

    @torch.no_grad()
    def score_latents(self, x_t: Tensor, t: Tensor, text: Conditioning, *, rows: Tensor | None = None) -> Tensor:
        """Scores (n,) of latents (n, c, h, w) at times t (n,).

        text: of n prompts; or of any number, of which latent i has the prompt rows[i].
        """
        n, _, height, width = x_t.shape
        rows = torch.arange(n, device=self.device) if rows is None else rows
        size = self.batch_size or max(1, POSITIONS // (self._passes * height * width))
        x_t, t = x_t.to(self.device), t.to(self.device)
        with torch.autocast(**self._precision):
            parts = [
                self.model.score(x_t[part], t[part], text[rows[part]])
                for part in (slice(start, start + size) for start in range(0, n, size))
            ]
        return torch.cat(parts)
