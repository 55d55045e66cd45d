"""FLUX.1: T5 and a pooled CLIP embedding, latents packed into patches, distilled guidance (dev) or none (schnell)."""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from spo.core.types import Conditioning
from spo.models.flow import FlowNetwork


class FluxNetwork(FlowNetwork):
    """Conditioned on `prompt_embeds` (b, tokens, width) and `pooled_embeds` (b, width)."""

    is_distilled: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        return self.module.config.in_channels // self.patch_size**2

    def grid(self, steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": self.mu}

    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, None, device=self.device, **self.text_options)
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def _inputs(self, x_t: Tensor, cond: Conditioning, guided: bool) -> dict[str, Any]:
        embeds = self._halves(cond, "prompt_embeds", guided=False)
        rows, columns = (side // self.patch_size for side in x_t.shape[-2:])
        places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))  # (patches, 3)
        return {
            "encoder_hidden_states": embeds,
            "pooled_projections": self._halves(cond, "pooled_embeds", guided=False),
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=self.device, dtype=self.dtype),
            "img_ids": places.to(self.device, self.dtype),
        }

    def _output(self, x_t: Tensor, t: Tensor, inputs: dict[str, Any], guidance_scale: float) -> Tensor:
        guidance = torch.full((len(x_t),), guidance_scale, device=self.device)
        output = self.module(
            pack(x_t, self.patch_size),
            timestep=t.to(self.dtype) / 1000,
            guidance=guidance if self.module.config.guidance_embeds else None,
            **inputs,
        ).sample
        return unpack(output, self.patch_size, height=x_t.shape[-2])


def pack(latents: Tensor, patch_size: int) -> Tensor:
    """Patches (b, h w / p^2, c p^2), row by row, of latents (b, c, h, w)."""
    return pixel_unshuffle(latents, patch_size).flatten(2).transpose(1, 2)


def unpack(patches: Tensor, patch_size: int, *, height: int) -> Tensor:
    """Latents (b, c, h, w) of patches (b, h w / p^2, c p^2)."""
    return pixel_shuffle(patches.transpose(1, 2).unflatten(2, (height // patch_size, -1)), patch_size)
