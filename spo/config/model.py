"""The diffusion model and its sampler."""

from typing import Annotated, Literal

from pydantic import Field

from spo.config.base import Fraction, Positive, Section


class ModelConfig(Section):
    """The diffusion model to align: a diffusers repository by hub name or local folder."""

    family: Literal["sd15", "sdxl"]
    path: str
    revision: str | None = None
    variant: str | None = None  # e.g. fp16
    vae: str | None = None  # another VAE, e.g. madebyollin/sdxl-vae-fp16-fix
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    resolution: Positive  # pixels; height and width
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the UNet's transformer blocks; only useful on a GPU


class SamplingConfig(Section):
    """The DDIM sampler of SPO's rollout; the paper's is 20 steps, eta 1, guidance 5."""

    steps: Positive = 20
    eta: Fraction = 1.0
    guidance_scale: Annotated[float, Field(ge=1)] = 5.0
