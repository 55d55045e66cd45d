"""Stable Diffusion XL: two text encoders, a pooled embedding, and the image's size as a condition."""

from typing import Any

import torch
from torch import Tensor

from spo.core.types import Conditioning
from spo.models.network import Network


class StableDiffusionXLNetwork(Network):
    """Conditioned on `prompt_embeds` (b, tokens, width), `pooled_embeds` (b, width) and uncropped images."""

    upcasts_vae = True

    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def _embed_negative(self) -> dict[str, Tensor]:
        """Zeros if the pipeline says so, like SDXL's."""
        empty = super()._embed_negative()
        if self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        return empty

    def _inputs(self, x_t: Tensor, cond: Conditioning, guided: bool) -> dict[str, Any]:
        pooled = self._halves(cond, "pooled_embeds", guided)
        size = [side * self.pipeline.vae_scale_factor for side in x_t.shape[-2:]]
        time_ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=self.device)
        return {
            "encoder_hidden_states": self._halves(cond, "prompt_embeds", guided),
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)},
        }
