"""Latent preference models on disk: our folders. spo.preference.latent_published has the published layout.

A folder holds config.json (our format's mark, settings, the parts' configurations, the latent space),
model.safetensors, and each text encoder's tokenizer in tokenizer/ and tokenizer_2/. It has no autoencoder: latents are
made with the base's.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from accelerate import init_empty_weights
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from spo.core.types import Conditioning
from spo.errors import ModelError, one_line
from spo.preference.checkpoint import damaged, fill_model, read_settings, write_model
from spo.preference.latent import LatentPreferenceModel, half_unet
from spo.preference.latent_space import LatentSpace
from spo.preference.repository import read_tokenizer
from spo.runtime.files import atomic_path

KIND = "latent"
ENCODERS: dict[str, tuple[Any, ...]] = {"sd15": (CLIPTextModel,), "sdxl": (CLIPTextModel, CLIPTextModelWithProjection)}
TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class LatentPreference:
    """A latent preference model and what belongs to it."""

    model: LatentPreferenceModel
    tokenizers: tuple[CLIPTokenizer, ...]  # one a text encoder
    space: LatentSpace | None  # None where a published checkpoint does not tell

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, vae: Any = None, **options: Any) -> Self:
        """The start of training from a diffusers pipeline; options as in LatentPreferenceModel.from_diffusion.

        vae: the autoencoder in use where it is not the pipeline's own, such as one in another precision.
        """
        model = LatentPreferenceModel.from_diffusion(pipeline, **options)
        tokenizers = tuple(getattr(pipeline, name) for name in TOKENIZERS[: model.num_text_encoders])
        return cls(model, tokenizers, LatentSpace.of(vae or pipeline.vae))

    @property
    def family(self) -> str:
        return "sd15" if self.model.num_text_encoders == 1 else "sdxl"

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """LatentPreferenceModel.encode of b prompts, on the model's device; differentiable."""
        device = self.model.logit_scale.device

        def ids(texts: list[str]) -> list[Any]:
            return [
                tokenizer(
                    texts,
                    padding="max_length",
                    truncation=True,
                    max_length=encoder.config.max_position_embeddings,
                    return_tensors="pt",
                ).input_ids.to(device)
                for tokenizer, encoder in zip(self.tokenizers, self.model.text_encoders, strict=True)
            ]

        return self.model.encode(ids(list(prompts)), ids([""]))

    def save(self, folder: str | Path) -> None:
        save_latent_preference(self, folder)

    def check_autoencoder(self, vae: Any) -> str | None:
        """ModelError where `vae`, the policy's, makes other latents than the model reads; a note if that is unknown."""
        if self.space is None:
            return "the preference model does not say which autoencoder's latents it reads; the policy's is trusted"
        self.space.check(vae)
        return None


def save_latent_preference(preference: LatentPreference, folder: str | Path) -> None:
    """Write a folder that load_latent_preference reads; it is whole or not there."""
    model = preference.model
    values = {
        "kind": KIND,
        "family": preference.family,
        "projection_size": model.visual_projection.out_features,
        "image_size": model.image_size,
        "guidance_scale": model.guidance_scale,
        "num_guided": model.num_guided,
        "latent_space": preference.space and asdict(preference.space),
        "unet": public(json.loads(model.unet.to_json_string())),
        "text_encoders": [public(json.loads(each.config.to_json_string())) for each in model.text_encoders],
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for name, tokenizer in zip(TOKENIZERS, preference.tokenizers, strict=False):
            tokenizer.save_pretrained(temporary / name)
        write_model(model, values, temporary)


def load_latent_preference(folder: str | Path) -> LatentPreference:
    """Read what save_latent_preference wrote, in float32 on the CPU; ModelError in one line if it cannot be."""
    folder = Path(folder)
    values = read_settings(folder, kind=KIND)
    if values.get("family") not in ENCODERS:
        raise ModelError(f"{folder} holds a preference model of family {values.get('family')}, not of {[*ENCODERS]}")
    try:
        model = _empty_model(values)
        space = LatentSpace.from_json(values["latent_space"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, one_line(error)) from None
    fill_model(model, folder)
    tokenizers = tuple(
        read_text_tokenizer(folder / name, encoder)
        for name, encoder in zip(TOKENIZERS, model.text_encoders, strict=False)
    )
    return LatentPreference(model.eval(), tokenizers, space)


def read_text_tokenizer(folder: Path, encoder: Any) -> CLIPTokenizer:
    """The tokenizer in a folder; ModelError if it is missing or does not fit the text encoder."""
    return read_tokenizer(folder, CLIPConfig(text_config=encoder.config.to_dict()))


def _empty_model(values: dict[str, Any]) -> LatentPreferenceModel:
    """A model of these settings, its weights on the meta device: to be loaded with `assign`."""
    kinds = ENCODERS[values["family"]]
    configs = [CLIPTextConfig.from_dict(each) for each in values["text_encoders"]]
    with init_empty_weights():
        return LatentPreferenceModel(
            half_unet(values["unet"]),
            [kind(config) for kind, config in zip(kinds, configs, strict=True)],
            projection_size=values["projection_size"],
            image_size=values["image_size"],
            guidance_scale=values["guidance_scale"],
            num_guided=values["num_guided"],
        )


def public(values: dict[str, Any]) -> dict[str, Any]:
    """Without the libraries' own notes, such as the folder that a part was loaded from."""
    return {name: value for name, value in values.items() if not name.startswith("_")}
