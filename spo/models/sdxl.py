"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size as a condition."""

import copy
from typing import Any

import torch
from torch import Tensor

from spo.core.types import Conditioning
from spo.models.base import LatentDiffusion, Pipeline


class StableDiffusionXL(LatentDiffusion):
    """Conditioned on `prompt_embeds` (b, tokens, width), `pooled_embeds` (b, width) and uncropped square images.

    A VAE that overflows in float16 runs in float32, as the pipeline's own call does with it; that of
    madebyollin/sdxl-vae-fp16-fix need not.
    """

    def __init__(self, pipeline: Pipeline, **options: Any):
        super().__init__(pipeline, **options)
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae = copy.deepcopy(self.vae).float()

    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def _embed_negative(self) -> dict[str, Tensor]:
        """Zeros where the pipeline says so, as SDXL's does."""
        empty = super()._embed_negative()
        if self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        return empty

    def _unet_inputs(self, cond: Conditioning, guided: bool) -> dict[str, Any]:
        pooled = self._halves(cond, "pooled_embeds", guided)
        side = self.latent_shape[-1] * self.pipeline.vae_scale_factor
        time_ids = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=self.device)
        return {
            "encoder_hidden_states": self._halves(cond, "prompt_embeds", guided),
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)},
        }
