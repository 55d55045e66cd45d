"""Stable Diffusion v1.x (and others of its pipeline class): one text encoder."""

from typing import Any

from torch import Tensor

from spo.core.types import Conditioning
from spo.models.network import Network


class StableDiffusionNetwork(Network):
    """Conditioned on `prompt_embeds` (b, tokens, width)."""

    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def _inputs(self, x_t: Tensor, cond: Conditioning, guided: bool) -> dict[str, Any]:
        return {"encoder_hidden_states": self._halves(cond, "prompt_embeds", guided)}
