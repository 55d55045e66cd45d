"""A preference model that reads noisy latents: LRM (LPO, arXiv 2502.01051; published code Kwai-Kolors/LPO).

It is the half of a diffusion model that looks at its input: the UNet's down and mid blocks and the text encoders. It
therefore scores x_t at time t itself. No x_0 is predicted, nothing is decoded.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Generator, Tensor, nn

from spo.core.prediction import guide
from spo.core.types import Conditioning

GUIDANCE_SCALE = 7.5
LOGIT_SCALE = 2.6592  # log(1 / .07), with which CLIP starts, too
NULL = "null_"  # before the names of the empty prompt's tensors


class LatentPreferenceModel(nn.Module):
    """score = exp(logit_scale) cos(image, text) of latents x_t at time t.

    image: the outputs of the down blocks' last layers and of the mid block, each averaged over height and width, then
    one linear layer. The mid block's is guided: null + guidance_scale (text - null), with the features for the prompt
    and for the empty prompt; the paper calls it visual feature enhancement. It is part of training, too.
    text: SD v1.5's pooled text embedding through a linear layer; SDXL's projected one of its second encoder as it is.

    All of it trains; below float32 it is to be run under autocast.

    Args:
        unet: one without an up path, from `half_unet` or `half_of`
        text_encoders: SD v1.5's CLIPTextModel, or SDXL's two, the second a CLIPTextModelWithProjection
        projection_size: d, the width of the features that are compared; 768 for SD v1.5, 1280 for SDXL
        image_size: height and width that SDXL's UNet gets, whatever the size of the latents; that of its training
        guidance_scale: 1 for none, and then without the second pass
        num_guided: how many features are guided, from the mid block upwards. The published option "all blocks" is 5 for
            SD v1.5 and 3 for SDXL, where it leaves the first block out
        generator: a CPU generator of the projections' weights
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoders: Sequence[nn.Module],
        *,
        projection_size: int,
        image_size: int,
        guidance_scale: float = GUIDANCE_SCALE,
        num_guided: int = 1,
        generator: Generator | None = None,
    ):
        super().__init__()
        if not 1 <= len(text_encoders) <= 2:
            raise ValueError(f"got {len(text_encoders)} text encoders; SD v1.5 has 1 and SDXL 2")
        self.unet: Any = unet
        self.text_encoders: Any = nn.ModuleList(text_encoders)
        self.widths = [*unet.config.block_out_channels, unet.config.block_out_channels[-1]]
        if not 1 <= num_guided <= len(self.widths):
            raise ValueError(
                f"num_guided={num_guided} must lie in [1, {len(self.widths)}]; the paper guides 1, the mid"
            )
        self.visual_projection = new_projection(sum(self.widths), projection_size, generator)
        self.text_projection: nn.Linear | None = None
        if len(text_encoders) == 1:
            encoder: Any = text_encoders[0]
            self.text_projection = new_projection(encoder.config.hidden_size, projection_size, generator)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.image_size = image_size
        self.guidance_scale = guidance_scale
        self.num_guided = num_guided

    @classmethod
    def from_diffusion(
        cls,
        pipeline: Any,
        *,
        projection_size: int | None = None,
        text_projection: Tensor | None = None,
        generator: Generator | None = None,
        **options: Any,
    ) -> Self:
        """The start of training: a float32 copy of the halves of a diffusers pipeline without LoRA, on its device.

        projection_size: None for the `projection_dim` of the last text encoder. text_projection: (d, width), for SD
        v1.5 that of openai/clip-vit-large-patch14 as in the published code; random where it is None.
        options: guidance_scale, num_guided. Raises ValueError where the pipeline has a LoRA or a size does not fit.
        """
        if getattr(pipeline.unet, "peft_config", None):
            raise ValueError("the UNet has a LoRA; make the preference model before one is attached")
        encoders = [copy.deepcopy(encoder).requires_grad_(True) for encoder in text_encoders_of(pipeline)]
        size = projection_size or encoders[-1].config.projection_dim
        side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        model = cls(
            half_of(pipeline.unet), encoders, projection_size=size, image_size=side, generator=generator, **options
        )
        if text_projection is not None:
            if model.text_projection is None or text_projection.shape != model.text_projection.weight.shape:
                raise ValueError(f"text_projection {tuple(text_projection.shape)} does not fit the text encoder")
            model.text_projection.weight.data.copy_(text_projection)
        return model.float().to(pipeline.unet.device)

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()
        for encoder in self.text_encoders:
            encoder.activation_checkpointing_enable()

    @property
    def num_text_encoders(self) -> int:
        return len(self.text_encoders)

    def encode(self, input_ids: Sequence[Tensor], null_ids: Sequence[Tensor]) -> Conditioning:
        """What the scores need of b prompts: `text` (b, d), and what the UNet attends to for them and the empty prompt.

        input_ids: (b, length) for each text encoder; null_ids: (1, length) likewise. All is encoded once.
        """
        both = [torch.cat(each) for each in zip(input_ids, null_ids, strict=True)]
        embeds, pooled = self._embed(both)
        b = len(pooled) - 1
        tensors = {"prompt_embeds": embeds[:b], f"{NULL}prompt_embeds": embeds[b:].expand(b, -1, -1)}
        if self.text_projection is None:
            tensors |= {"pooled_embeds": pooled[:b], f"{NULL}pooled_embeds": pooled[b:].expand(b, -1)}
            return Conditioning({"text": pooled[:b], **tensors})
        return Conditioning({"text": self.text_projection(pooled[:b]), **tensors})

    def _embed(self, input_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings (b, length, width) and the pooled one (b, width), as the family's pipeline makes them."""
        outputs = [
            encoder(ids, output_hidden_states=True) for encoder, ids in zip(self.text_encoders, input_ids, strict=True)
        ]
        if self.text_projection is not None:
            return outputs[0].last_hidden_state, outputs[0].pooler_output
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds

    def score(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """Scores (n,), float32, of latents (n, c, h, w) at times t (n,) for n prompts from `encode`."""
        image = self.image_features(x_t, t, text)
        return self.logit_scale.float().exp() * F.cosine_similarity(image, text.tensors["text"].float(), dim=-1)

    def image_features(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """(n, d), float32, not normalised."""
        return self.visual_projection(self.pooled_features(x_t, t, text)).float()

    def pooled_features(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """(n, sum of widths): the down blocks in order, then the mid block, guided. Both prompts go in one call."""
        if self.guidance_scale == 1:
            return torch.cat(self._pass(x_t, t, text, [""]), dim=-1)
        halves = [each.chunk(2) for each in self._pass(x_t.repeat(2, 1, 1, 1), t.repeat(2), text, [NULL, ""])]
        first = len(halves) - self.num_guided
        guided = [guide(null, positive, self.guidance_scale) for null, positive in halves[first:]]
        return torch.cat([*(positive for _, positive in halves[:first]), *guided], dim=-1)

    def _pass(self, x_t: Tensor, t: Tensor, text: Conditioning, kinds: Sequence[str]) -> list[Tensor]:
        """Averages (n, width) of the blocks for the prompts of each kind, NULL or "", one kind after the other."""

        def named(name: str) -> Tensor:
            return torch.cat([text.tensors[kind + name] for kind in kinds])

        added = {}
        if self.text_projection is None:
            side = self.image_size
            time_ids = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=x_t.device)
            added = {"text_embeds": named("pooled_embeds"), "time_ids": time_ids.expand(len(x_t), -1)}
        return block_averages(self.unet, x_t.to(self.unet.dtype), t, named("prompt_embeds"), added)


def block_averages(
    unet: Any, x_t: Tensor, t: Tensor, prompt_embeds: Tensor, added: Mapping[str, Tensor]
) -> list[Tensor]:
    """The UNet's forward up to its mid block: averages (n, width), float32, of each down block and the mid block.

    A down block's is of its last layer, before the downsampler. All but the averages is the UNet's own code.
    """
    emb = unet.time_embedding(unet.get_time_embed(x_t, t))
    aug_emb = unet.get_aug_embed(emb, prompt_embeds, added)
    emb = emb if aug_emb is None else emb + aug_emb
    attended = {"encoder_hidden_states": unet.process_encoder_hidden_states(prompt_embeds, added)}

    def given_to(block: Any) -> dict[str, Tensor]:
        return attended if getattr(block, "has_cross_attention", False) else {}

    x = unet.conv_in(x_t)
    averages = []
    for block in unet.down_blocks:
        x, outputs = block(hidden_states=x, temb=emb, **given_to(block))  # one output a layer, then the downsampler's
        averages.append(outputs[len(block.resnets) - 1].mean(dim=(2, 3), dtype=torch.float32))
    x = unet.mid_block(x, emb, **given_to(unet.mid_block))
    return [*averages, x.mean(dim=(2, 3), dtype=torch.float32)]


def half_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet without up path and output convolution, its weights on the meta device: to be loaded with `assign`."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}  # no folder's name
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(settings)
    if unet.mid_block is None or unet.class_embedding is not None or unet.time_embed_act is not None:
        raise ValueError("the UNet has no mid block, or a class embedding; use a Stable Diffusion UNet")
    unet.up_blocks = nn.ModuleList()
    unet.conv_norm_out = unet.conv_out = None
    return unet


def half_of(unet: Any) -> UNet2DConditionModel:
    """A float32 copy of a UNet's conv_in, embeddings, down blocks and mid block."""
    half: Any = half_unet(unet.config)
    weights = unet.state_dict()
    copied = {name: weights[name].detach().float().clone() for name in half.state_dict()}
    half.load_state_dict(copied, assign=True)
    return half.requires_grad_(True)


def text_encoders_of(pipeline: Any) -> list[Any]:
    """The pipeline's one or two text encoders."""
    found = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    return [encoder for encoder in found if encoder is not None]


def new_projection(width: int, size: int, generator: Generator | None) -> nn.Linear:
    """A linear layer without bias, at the published start."""
    layer = nn.Linear(width, size, bias=False)
    nn.init.normal_(layer.weight, std=0.02, generator=generator)
    return layer
