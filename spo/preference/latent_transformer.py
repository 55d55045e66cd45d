"""A latent preference model of a flow model: the first blocks of its transformer (LPO, arXiv 2502.01051, for SD3).

The paper takes the features of SD3's layer 18 of 24 and freezes the text encoders; its code for SD3 was not published.
So the folder of such a model has no text encoders: prompts are encoded by the base, which must be of the same family.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from spo.core.prediction import guide
from spo.core.types import Conditioning
from spo.errors import ModelError, one_line
from spo.preference.checkpoint import damaged, fill_model, write_model
from spo.preference.latent import LOGIT_SCALE, new_projection
from spo.preference.latent_checkpoint import KIND, public
from spo.preference.latent_space import LatentSpace
from spo.runtime.files import atomic_path

LAYERS = 0.75  # of the joint blocks: 18 of SD3's 24


class TransformerPreferenceModel(nn.Module):
    """score = exp(logit_scale) cos(image, text) of latents x_t at time t.

    image: the image tokens after the last of the joint blocks, averaged, then one linear layer; guided as in
    `spo.preference.latent`, unless the family has distilled guidance.
    text: the pooled embedding through a linear layer.

    Args:
        network: the base's `spo.models.network.Network`; of it only the encoding of prompts and the way of calling a
            transformer are used
        transformer: the first blocks of such a transformer, from `first_blocks`
        projection_size: d, the width of the features that are compared
        guidance_scale: 1 for none, and then without the second pass
        generator: a CPU generator of the projections' weights
    """

    def __init__(
        self,
        network: Any,
        transformer: Any,
        *,
        projection_size: int,
        guidance_scale: float,
        generator: Generator | None = None,
    ):
        super().__init__()
        self.transformer: Any = transformer
        self.visual_projection = new_projection(transformer.inner_dim, projection_size, generator)
        self.text_projection = new_projection(transformer.config.pooled_projection_dim, projection_size, generator)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.guidance_scale = 1.0 if network.is_distilled else guidance_scale
        self.network = copy.copy(network)
        self.network.module = transformer
        self.network.autocast = True  # in half precision, for its weights are float32

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the scores need of b prompts: `text` (b, d), and the base's embeddings, which are not trained."""
        cond = self.network.encode(prompts)
        text = self.text_projection(cond.tensors["pooled_embeds"].to(self.text_projection.weight.dtype))
        return Conditioning({**cond.tensors, "text": text})

    def score(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """Scores (n,), float32, of latents (n, c, h, w) at times t (n,) for n prompts from `encode`."""
        image = self.visual_projection(self.pooled_features(x_t, t, text)).float()
        return self.logit_scale.float().exp() * F.cosine_similarity(image, text.tensors["text"].float(), dim=-1)

    def pooled_features(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """(n, width), float32: the mean of the image tokens after the last block, guided."""
        device = x_t.device.type
        self.network.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        found: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0].mean(dim=1, dtype=torch.float32))

        hook = self.transformer.norm_out.register_forward_pre_hook(keep)  # its input is what the last block gives
        try:
            self.network.predict(x_t, t, text, guidance_scale=self.guidance_scale)
        finally:
            hook.remove()
        if self.guidance_scale == 1:
            return torch.cat(found)
        halves = [features.chunk(2) for features in found]
        return torch.cat([guide(null, positive, self.guidance_scale) for null, positive in halves])

    def enable_gradient_checkpointing(self) -> None:
        self.transformer.enable_gradient_checkpointing()


@dataclass(frozen=True)
class TransformerPreference:
    """A transformer's preference model and the latents that it reads."""

    model: TransformerPreferenceModel
    family: str
    space: LatentSpace | None

    @classmethod
    def from_network(
        cls,
        network: Any,
        *,
        family: str,
        vae: Any,
        layers: int | None,
        projection_size: int | None,
        guidance_scale: float,
        generator: Generator,
    ) -> Self:
        """The start of training from the base's network; None: three quarters of its blocks, and its pooled width.

        ModelError if it has fewer blocks.
        """
        transformer = first_blocks(network.module, layers)
        model = TransformerPreferenceModel(
            network,
            transformer,
            projection_size=projection_size or transformer.config.pooled_projection_dim,
            guidance_scale=guidance_scale,
            generator=generator,
        )
        return cls(model.to(network.device), family, LatentSpace.of(vae))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self.model.encode(prompts)

    def check_autoencoder(self, vae: Any) -> None:
        """ModelError where `vae`, the policy's, makes other latents than the model reads."""
        if self.space is not None:
            self.space.check(vae)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads; it is whole or not there."""
        model = self.model
        values = {
            "kind": KIND,
            "family": self.family,
            "layers": len(model.transformer.transformer_blocks),
            "projection_size": model.visual_projection.out_features,
            "guidance_scale": model.guidance_scale,
            "latent_space": self.space and asdict(self.space),
            "transformer": public(json.loads(model.transformer.to_json_string())),
        }
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            write_model(model, values, temporary)

    @classmethod
    def load(cls, folder: Path, values: dict[str, Any], network: Any) -> Self:
        """Read what `save` wrote, of settings `values`, for the base's network; ModelError if it does not fit it."""
        try:
            transformer = _empty(type(network.module), values["transformer"], values["layers"])
            sizes = {"projection_size": values["projection_size"], "guidance_scale": values["guidance_scale"]}
            model = TransformerPreferenceModel(network, transformer, **sizes)
            latents = LatentSpace.from_json(values["latent_space"])
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(folder, one_line(error)) from None
        fill_model(model, folder)
        return cls(model.eval(), values["family"], latents)


def first_blocks(transformer: Any, layers: int | None) -> Any:
    """A float32 copy of a transformer up to its joint block `layers`, without single blocks; None: three quarters."""
    if getattr(transformer, "peft_config", None):
        raise ValueError("the transformer has a LoRA; make the preference model before one is attached")
    total = len(transformer.transformer_blocks)
    count = layers or max(1, round(LAYERS * total))
    if count > total:
        raise ModelError(f"layers={count} is more than the {total} joint blocks of the base's transformer")
    first = _empty(type(transformer), transformer.config, count)
    weights = transformer.state_dict()
    first.load_state_dict({name: weights[name].detach().float().clone() for name in first.state_dict()}, assign=True)
    return first.requires_grad_(True)


def _empty(kind: Any, config: Any, layers: int) -> Any:
    """Such a transformer's first blocks, their weights on the meta device: to be loaded with `assign`."""
    settings = {name: value for name, value in dict(config).items() if not name.startswith("_")}
    with torch.device("meta"):
        transformer = kind.from_config(settings)
    transformer.transformer_blocks = transformer.transformer_blocks[:layers]
    if hasattr(transformer, "single_transformer_blocks"):
        transformer.single_transformer_blocks = nn.ModuleList()
    return transformer
