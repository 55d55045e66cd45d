"""The embedded default's flow model: a small SD3 transformer, taught by rectified flow on the base's training pictures.

Autoencoder and text encoders are those of data/base/tiny and data/base/tiny-preference, frozen; there is no T5. The
transformer predicts the velocity noise - x_0 at x_t = (1 - sigma) x_0 + sigma noise (Liu et al., arXiv 2209.03003).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Generator, Tensor, nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from spo.world.pretraining.clip import token_ids
from spo.world.pretraining.denoiser import Average, draw_rows
from spo.world.pretraining.updates import updates
from spo.world.scenes import all_scenes


def new_transformer(latent_channels: int) -> SD3Transformer2DModel:
    """1.7 million parameters on 8 x 8 latents in patches of 2 x 2; every block starts as the identity, as in DiT."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=5,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if name.endswith((".linear", "proj_out")):  # the modulations and the output
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


@torch.no_grad()
def with_projection(tower: Any, projection: Tensor, *, scale: float) -> CLIPTextModelWithProjection:
    """A frozen CLIP text tower of width d with a projection (d, d).

    SD3 reads the last but one hidden state, which has no norm. There ours have standard deviations of 8 and 3, which
    `scale` brings to 1; the norms in the layers make up for it.
    """
    config = CLIPTextConfig(**{**tower.config.to_dict(), "projection_dim": len(projection)})
    encoder = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    own = encoder.state_dict()
    weights = {k if k in own else f"text_model.{k}": weight for k, weight in tower.state_dict().items()}
    encoder.load_state_dict({**weights, "text_projection.weight": projection})
    for name, weight in encoder.named_parameters():
        if any(part in name for part in ("embedding", "out_proj", "fc2")):
            weight *= scale
    return encoder


@dataclass(frozen=True)
class Frozen:
    """The parts of the pipeline that are not trained here."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]

    @classmethod
    def load(cls, base: Path, preference: Path) -> "Frozen":
        """Autoencoder, tokenizer and first text encoder of the folder `base`, the second encoder of `preference`."""
        first = CLIPTextModel.from_pretrained(base / "text_encoder")
        second = CLIPModel.from_pretrained(preference)
        vae = AutoencoderKL.from_pretrained(base / "vae").eval().requires_grad_(False)
        vae.register_to_config(shift_factor=0.0, _name_or_path="")  # SD3 asks for a shift; no folder of this machine
        return cls(
            vae,
            CLIPTokenizer.from_pretrained(base / "tokenizer"),
            (
                with_projection(first, torch.eye(first.config.hidden_size), scale=1 / 8),
                with_projection(second.text_model, second.text_projection.weight, scale=1 / 3),
            ),
        )


@torch.no_grad()
def encode(encoders: Sequence[CLIPTextModelWithProjection], tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    """Embeddings (n, tokens + 1, 128) and pooled (n, 128) of every scene's prompt and, last, of the empty one.

    The last token is zero: what the pipeline puts in T5's place for `max_sequence_length=1`.
    """
    ids = token_ids(tokenizer, [*(scene.prompt for scene in all_scenes()), ""])
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    embeddings = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return F.pad(embeddings, (0, 0, 0, 1)), torch.cat([output.text_embeds for output in outputs], dim=-1)


def train_flow(
    transformer: SD3Transformer2DModel,
    prompts: tuple[Tensor, Tensor],
    latents: Tensor,
    scene_index: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: Generator,
) -> Iterator[dict[str, float]]:
    """Train in place; yields each step's loss. After the last one the weights are their running average.

    sigma = sigmoid(z) with a standard normal z (SD3, arXiv 2403.03206, section 3.1); a batch has one of each of
    batch_size quantiles.
    """
    device = next(transformer.parameters()).device
    embeddings, pooled = (each.to(device) for each in prompts)
    latents = latents.to(device)
    average = Average(transformer, decay=0.998)
    parameters = list(transformer.parameters())
    for step, update in enumerate(updates(parameters, steps, learning_rate, warm_up=100, floor=0.03)):
        row, prompt = (i.to(device) for i in draw_rows(scene_index, batch_size, generator, empty=len(pooled) - 1))
        u = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        sigma = torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).sigmoid().to(device)
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator).to(device)
        x_0, s = latents[row], sigma.view(-1, 1, 1, 1)
        predicted = transformer((1 - s) * x_0 + s * noise, embeddings[prompt], pooled[prompt], 1000 * sigma).sample
        loss = (predicted - (noise - x_0)).pow(2).mean()
        update(loss)
        average.update(step)
        yield {"loss": loss.item()}
    average.apply()


def save_flow(frozen: Frozen, transformer: SD3Transformer2DModel, folder: Path) -> None:
    """Save like any Stable Diffusion 3 repository without T5; the transformer's weights in float16."""
    first, second = frozen.text_encoders
    StableDiffusion3Pipeline(
        transformer=transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(),  # shift 1, as in training
        vae=frozen.vae,
        text_encoder=first,
        tokenizer=frozen.tokenizer,
        text_encoder_2=second,
        tokenizer_2=frozen.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder, safe_serialization=True)
