"""The step-aware preference model: a CLIP whose vision tower is conditioned on the timestep (paper section 4.1).

A plain CLIP scores clean images. Adaptive layer norm (DiT, arXiv 2212.09748) conditions its vision tower on the
timestep of the predicted x_0. It starts as the identity, so the model starts as the plain CLIP for every t.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel

FREQUENCIES = 128  # each as a cosine and a sine, so the sinusoidal embedding has width 256
MAX_PERIOD = 10_000


class TimestepEmbedder(nn.Module):
    """Linear(SiLU(Linear(sinusoids of t))), with the width of the vision tower."""

    def __init__(self, width: int, *, generator: Generator | None = None):
        super().__init__()
        first, last = nn.Linear(2 * FREQUENCIES, width), nn.Linear(width, width)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.02, generator=generator)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, t: Tensor) -> Tensor:
        """Embeddings (..., width) of timesteps t (...)."""
        rates = torch.exp(-math.log(MAX_PERIOD) * torch.arange(FREQUENCIES, device=t.device) / FREQUENCIES)
        angles = t[..., None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.parameters()).dtype))


class Modulation(nn.Linear):
    """A linear layer whose output starts as 0, or as 1 for the parts in `gates`, for every t."""

    def __init__(self, width: int, *, parts: int, gates: tuple[int, ...] = ()):
        self.gates = gates
        super().__init__(width, parts * width)

    def reset_parameters(self) -> None:
        """Take the place of nn.Linear's random start, whose 315 million numbers for CLIP-H would be overwritten."""
        width = self.in_features
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        for gate in self.gates:
            nn.init.ones_(self.bias[gate * width : (gate + 1) * width])


@dataclass(frozen=True)
class Modulations:
    """The outputs of the modulation layers for g timesteps."""

    layers: tuple[Tensor, ...]  # (g, 6 * width) each
    final: Tensor  # (g, 2 * width)

    def __getitem__(self, row: Tensor) -> "Modulations":
        return Modulations(tuple(layer[row] for layer in self.layers), self.final[row])


class StepAwareCLIP(nn.Module):
    """A transformers CLIPModel and the adaLN of its vision tower; score = exp(logit_scale) * cos(image, text).

    Each encoder layer has six modulations of t, the shift, scale and gate of its attention and of its MLP:
    x + gate * branch(norm(x) * (1 + scale) + shift); the pooled token has a shift and a scale after its norm.
    The modulations depend only on t, so they are computed once for each distinct t of a batch. `clip` is wrapped, not
    copied.
    """

    def __init__(self, clip: CLIPModel, *, generator: Generator | None = None):
        super().__init__()
        width = clip.vision_embed_dim
        self.clip = clip
        self.t_embedder = TimestepEmbedder(width, generator=generator)
        self.layer_modulation = nn.ModuleList(
            Modulation(width, parts=6, gates=(2, 5)) for _ in clip.vision_model.encoder.layers
        )
        self.final_modulation = Modulation(width, parts=2)
        self.gradient_checkpointing = False

    @classmethod
    def from_clip(cls, clip: CLIPModel, *, generator: Generator | None = None) -> Self:
        """A model that equals `clip` for every t, on its device and in its dtype.

        `generator`: a CPU generator for the timestep embedder's weights, which have no effect before training.
        """
        return cls(clip, generator=generator).to(device=clip.device, dtype=clip.dtype)

    def enable_gradient_checkpointing(self) -> None:
        """In training keep only the input of each layer of both towers, and compute the rest again for gradients."""
        self.gradient_checkpointing = True
        self.clip.activation_checkpointing_enable()

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit features (b, d), float32, of token ids (b, length)."""
        features = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return F.normalize(features.float(), dim=-1)

    def image_features(self, pixels: Tensor, t: Tensor) -> Tensor:
        """Unit features (n, d), float32, of normalised pixels (n, 3, size, size) at timesteps t (n,), or () for all."""
        distinct, row = torch.unique(t, return_inverse=True)
        return self.modulated_features(pixels, self.modulations(distinct)[row.reshape(-1)])

    def modulations(self, t: Tensor) -> Modulations:
        """The modulations of timesteps t (g,)."""
        condition = F.silu(self.t_embedder(t))  # (g, width)
        return Modulations(
            tuple(modulation(condition) for modulation in self.layer_modulation), self.final_modulation(condition)
        )

    def modulated_features(self, pixels: Tensor, modulations: Modulations) -> Tensor:
        """Unit features (n, d), float32, of normalised pixels (n, 3, size, size) under n modulations, or 1 for all."""
        tower = self.clip.vision_model
        x = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer, modulation in zip(tower.encoder.layers, modulations.layers, strict=True):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(_modulated_layer, layer, x, modulation, use_reentrant=False)
            else:
                x = _modulated_layer(layer, x, modulation)
        shift, scale = modulations.final.chunk(2, -1)
        pooled = _modulate(tower.post_layernorm(x[:, 0]), shift, scale)
        return F.normalize(self.clip.visual_projection(pooled).float(), dim=-1)

    def score(self, image: Tensor, text: Tensor) -> Tensor:
        """exp(logit_scale) * cosine (n,), float32, of unit features (n, d) each."""
        return self.clip.logit_scale.float().exp() * (image * text).sum(dim=-1)


def _modulated_layer(layer: Any, x: Tensor, modulation: Tensor) -> Tensor:
    """A layer of the vision tower on x (n, tokens, width) under the modulation (n or 1, 6 * width)."""
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.unsqueeze(-2).chunk(6, -1)
    attention, _ = layer.self_attn(_modulate(layer.layer_norm1(x), shift_1, scale_1), attention_mask=None)
    x = x + gate_1 * attention
    return x + gate_2 * layer.mlp(_modulate(layer.layer_norm2(x), shift_2, scale_2))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift
