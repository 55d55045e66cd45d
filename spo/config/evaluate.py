"""The comparison of base and aligned models, and the decision to promote a LoRA."""

from typing import Annotated

from pydantic import Field, model_validator

from spo.config.base import Fraction, Name, Positive, Section
from spo.config.metrics import MetricConfig


class LoraSource(Section):
    """A published LoRA: a folder, a .safetensors file or a hub repository; a plain string is its `source`."""

    source: str
    weight_name: str | None = None  # of the file, if a folder or repository has several
    revision: str | None = None  # of a hub repository

    @model_validator(mode="before")
    @classmethod
    def _named_plainly(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value


class NetworkSource(Section):
    """Published weights of the whole denoising network, in diffusers' format, such as LPO's merged UNets."""

    source: str  # a folder or a hub repository
    subfolder: str | None = None
    revision: str | None = None  # of a hub repository


class SamplerConfig(Section):
    """A sampler of images: a scheduler of diffusers and its settings."""

    scheduler: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")] = "DDIMScheduler"  # a class of diffusers
    steps: Positive = 20
    guidance_scale: Annotated[float, Field(ge=1)] = 5.0
    eta: Fraction | None = None  # 0: each step adds no noise; 1: DDPM's noise; None: 0, or the scheduler has no eta
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)  # settings of the scheduler

    @property
    def description(self) -> str:
        """The settings, e.g. 20 steps, guidance 5, eta 0."""
        scheduler = "" if self.scheduler == "DDIMScheduler" else f"{self.scheduler}, "
        eta = "" if self.eta is None else f", eta {self.eta:g}"
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{scheduler}{self.steps} steps, guidance {self.guidance_scale:g}{eta}{options}"


DDIM = {"ddim": SamplerConfig(eta=0.0), "ddim-stochastic": SamplerConfig(eta=1.0)}


class EvaluateConfig(Section):
    num_prompts: Positive  # of the test split, each with `images_per_prompt` seeds
    num_validation_prompts: Positive  # on which each method's checkpoint is chosen
    images_per_prompt: Positive = 1
    samplers: Annotated[dict[Name, SamplerConfig], Field(min_length=1)] = DDIM  # the first one decides
    batch_size: Positive = 64
    seed: int = 1234
    metrics: Annotated[tuple[MetricConfig, ...], Field(min_length=1)]
    primary: str  # the score that should rise
    guarded: tuple[str, ...] = ()  # scores that must not fall
    guard_tolerance: Annotated[float, Field(ge=0)] = 0.005  # allowed fall of a guarded mean of a checkpoint
    loras: dict[Name, LoraSource] = Field(default_factory=dict)  # columns of published LoRAs
    networks: dict[Name, NetworkSource] = Field(default_factory=dict)  # columns of published networks
    bootstrap_samples: Positive = 10_000

    @property
    def published(self) -> dict[str, LoraSource | NetworkSource]:
        """The columns of other people's models."""
        return {**self.loras, **self.networks}

    @property
    def deciding(self) -> str:
        """The name of the sampler that chooses checkpoints and decides: the first one."""
        return next(iter(self.samplers))

    @model_validator(mode="after")
    def _scores_exist(self) -> "EvaluateConfig":
        if twice := sorted(set(self.loras) & set(self.networks)):
            raise ValueError(f"loras and networks both name {twice}; give each column a name of its own")
        known = [name for metric in self.metrics for name in metric.scores]
        for name in (self.primary, *self.guarded):
            if name not in known:
                raise ValueError(f"primary and guarded must be scores of the metrics, {known}; got {name!r}")
        return self


class PromoteConfig(Section):
    """When a new LoRA becomes champion: see spo/evaluation/promotion.py; primary and guarded are evaluate's."""

    method: str | None = None  # whose released LoRA is the candidate; None: the first of `methods`
    tolerance: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    # for a guarded score: how far the 95% interval of its change may reach below zero, in that score's units;
    # by default evaluate.guard_tolerance
