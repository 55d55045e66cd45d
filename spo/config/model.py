"""The diffusion model and its sampler."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from spo.config.base import Fraction, Positive, Section

FLOW = "FlowMatchEulerDiscreteScheduler"  # diffusers' sampler of flow models


def sides(resolution: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a resolution: the side of a square, or width and height as people write them (1024 x 768)."""
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    return height, width


class ModelConfig(Section):
    """The diffusion model to align: a diffusers repository by hub name or local folder, or one .safetensors file."""

    family: Literal["sd15", "sdxl", "sd3", "flux"]
    path: str
    config: str | None = (
        None  # of a single file: the repository with its tokenizers and settings; None: diffusers' guess
    )
    revision: str | None = None
    variant: str | None = None  # e.g. fp16
    vae: str | None = None  # another VAE, e.g. madebyollin/sdxl-vae-fp16-fix
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    resolution: Positive | tuple[Positive, Positive]  # pixels: the side of a square, or width and height
    bucket_step: Positive | None = None  # pixels: labelled pairs keep their aspect, with sides in multiples of it
    t5: bool = True  # of sd3: false leaves out the largest text encoder, 4.7 billion weights
    t5_tokens: Positive | None = None  # of a prompt, for sd3 and flux; None: the pipeline's, 256 and 512 (schnell: 256)
    keep_prompts: bool = False  # encode each prompt once and keep the result in the CPU's memory
    offload_text_encoders: bool = False  # they wait in the CPU's memory while they encode no prompt
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the blocks of network and VAE; only useful on a GPU

    @model_validator(mode="after")
    def _config_fits(self) -> "ModelConfig":
        if self.config is not None and not self.is_single_file:
            raise ValueError(f"config={self.config!r} is for a path to a .safetensors file; got path={self.path!r}")
        return self

    @model_validator(mode="after")
    def _t5_fits(self) -> "ModelConfig":
        if not self.t5 and self.family != "sd3":
            raise ValueError(f"t5=false is for family sd3; {self.family} has no text encoder that it can do without")
        if self.t5_tokens is not None and not self.is_flow:
            raise ValueError(f"t5_tokens={self.t5_tokens} is for families sd3 and flux; {self.family} has no T5")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return sides(self.resolution)

    @property
    def is_single_file(self) -> bool:
        """Whether the model is one file, as web user interfaces have them."""
        return self.path.endswith(".safetensors")

    @property
    def is_flow(self) -> bool:
        """Whether the model is a rectified flow; the others are diffusion models."""
        return self.family in ("sd3", "flux")

    @property
    def is_distilled(self) -> bool:
        """Whether guidance is an input of the network instead of a second forward."""
        return self.family == "flux"

    @property
    def scheduler(self) -> str:
        """The diffusers class of the family's plain sampler."""
        return FLOW if self.is_flow else "DDIMScheduler"


class SamplingConfig(Section):
    """The sampler of SPO's rollout; the paper's is DDIM with 20 steps, eta 1, guidance 5."""

    steps: Positive = 20
    eta: Fraction = 1.0  # 0: no noise; 1: DDPM's
    noise: Literal["ddim", "flow-sde", "cps"] = "ddim"  # the last two: of flow models; eta is their noise level
    guidance_scale: Annotated[float, Field(ge=1)] = 5.0
