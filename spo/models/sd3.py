"""Stable Diffusion 3 and 3.5: two CLIP text encoders, T5 if the pipeline has it, a pooled embedding."""

from typing import Any

from torch import Tensor

from spo.core.types import Conditioning
from spo.models.flow import FlowNetwork


class StableDiffusion3Network(FlowNetwork):
    """Conditioned on `prompt_embeds` (b, tokens, width) and `pooled_embeds` (b, width)."""

    def grid(self, steps: int) -> dict[str, Any]:
        return {"mu": self.mu}

    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False, **self.text_options
        )
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def _inputs(self, x_t: Tensor, cond: Conditioning, guided: bool) -> dict[str, Any]:
        return {
            "encoder_hidden_states": self._halves(cond, "prompt_embeds", guided),
            "pooled_projections": self._halves(cond, "pooled_embeds", guided),
        }
