"""Prompts and preference pairs, and the preference model that learns from the pairs."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from spo.config.align import ScoringConfig
from spo.config.base import Fraction, Positive, Rate, Section
from spo.config.metrics import MetricConfig
from spo.config.model import SamplingConfig


class PromptsConfig(Section):
    source: str  # a .txt, .json, .jsonl, .csv, .tsv or .parquet file, or a folder of them
    field: str | None = None  # of the prompt, if rows have fields
    max_prompts: Positive | None = None


class PreferencesConfig(Section):
    source: str  # a folder or file of JSON Lines or parquet, or hub:NAME
    split: str = "train"  # of a hub data set
    max_pairs: Positive | None = None


class PrepareConfig(Section):
    prompts: PromptsConfig
    preferences: PreferencesConfig | None = None  # None: no pairs, for a preference model that is already trained
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2


class LabelsConfig(Section):
    """The labels of preference pairs: by people, or by a model of clean images (SDXL's recipe)."""

    kind: Literal["human", "pseudo"] = "human"
    model: str | None = None  # makes pseudo-labels: a CLIP repository such as yuvalkirstain/PickScore_v1
    processor: str | None = None  # repository of the tokenizer, if `model` has none
    tie_margin: Fraction = 0.1  # softmax gap below which a pseudo-label is a tie

    @model_validator(mode="after")
    def _pseudo_needs_model(self) -> "LabelsConfig":
        if (self.kind == "pseudo") != (self.model is not None):
            raise ValueError(
                "labels.kind=pseudo needs labels.model, e.g. yuvalkirstain/PickScore_v1, and kind=human has none"
            )
        return self


class PairFilter(Section):
    """Keeps the pairs on which metrics agree with the label (LPO, arXiv 2502.01051, section 4.1).

    A decided pair stays if, for every score named in `gaps`, winner less loser is above its gap; a tied one if for
    every score in `ties` the two images differ by its value at most, and always if `ties` is empty.
    """

    metrics: Annotated[tuple[MetricConfig, ...], Field(min_length=1)]
    gaps: Annotated[dict[str, float], Field(min_length=1)]
    ties: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _scores_exist(self) -> "PairFilter":
        measured = [score for metric in self.metrics for score in metric.scores]
        if unknown := sorted({*self.gaps, *self.ties} - set(measured)):
            raise ValueError(f"gaps and ties name {unknown}, but the metrics measure {measured}")
        return self


class CandidatesConfig(Section):
    """Agreement of a preference model with an independent metric on the best and worst candidate of one x_t.

    The base is sampled on validation prompts, and at each step the model picks the two, as SPO would.
    """

    metric: MetricConfig
    score: str  # the score of the metric to use
    num_prompts: Annotated[int, Field(ge=2)] = 32
    num_candidates: Annotated[int, Field(ge=2)] = 4
    look_ahead: bool = False  # measure what a candidate becomes when it is sampled to its end, not its predicted x_0

    @model_validator(mode="after")
    def _score_exists(self) -> "CandidatesConfig":
        if self.score not in self.metric.scores:
            raise ValueError(f"score must be one of {list(self.metric.scores)}; got {self.score!r}")
        return self


class TrainPreferenceConfig(Section, ABC):
    """What every kind of preference model trains with."""

    reads_x_0: ClassVar[bool] = True  # scores the predicted x_0, not the noisy latents

    checkpoint: str | None = None  # an already trained model: skips training
    labels: LabelsConfig | None = None  # None: the profile's, from which Diffusion-DPO learns too
    filter: PairFilter | None = None  # None: trains on all pairs
    steps: Positive
    batch_size: Positive  # pairs
    micro_batch_size: Positive | None = None  # pairs in memory at a time; None: all of a batch
    learning_rate: Rate
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    weight_decay: Annotated[float, Field(ge=0)] = 0.3
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    eight_bit: bool = False  # Adam's moments take 8 bits each, which needs bitsandbytes
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    evaluate_timesteps: tuple[Annotated[int, Field(ge=0)], ...] = (0, 251, 501, 701, 951)  # SPO's table of accuracies
    evaluate_pairs: Positive = 512  # validation pairs for the accuracy, at most
    candidates: CandidatesConfig | None = None  # measures the agreement on candidates; None: does not
    log_every: Positive = 20

    @property
    def is_trained(self) -> bool:
        """Whether it is used as it is, so that the stage only measures it."""
        return self.checkpoint is not None

    @abstractmethod
    def repositories(self) -> dict[str, tuple[str, str | None]]:
        """Models that it loads: by key of its section, a folder or hub name, and a file that must be in it."""

    @abstractmethod
    def forwards_per_pair(self, sampling: SamplingConfig) -> float:
        """UNet forwards of a pair in a step, each half of the guidance counted; backward passes are not counted."""

    @abstractmethod
    def unfit(self, scoring: ScoringConfig) -> str | None:
        """A setting of `scoring` that this kind cannot use, and why; None if there is none."""

    def miniature(self, *, examples: int) -> dict[str, Any]:
        """Changed settings for `check`: two steps with as many pairs at a time as in training; the first warms up."""
        at_a_time = min(self.micro_batch_size or self.batch_size, examples)
        small = {"steps": 2, "batch_size": at_a_time, "micro_batch_size": None, "evaluate_pairs": 2, "log_every": 1}
        few = self.candidates and self.candidates.model_copy(update={"num_prompts": 2}).model_dump()
        return small | {"evaluate_timesteps": self.evaluate_timesteps[:1], "candidates": few, "filter": None}

    def memory_remedy(self) -> str:
        now = self.micro_batch_size or self.batch_size
        return (
            f"set the preference model's micro_batch_size below {now}, model.gradient_checkpointing or the preference "
            "model's eight_bit to true, or train in bfloat16"
        )


class PixelPreferenceConfig(TrainPreferenceConfig):
    """SPO's step-aware model, a CLIP of the predicted x_0 (paper section 4.1; SD 1.5: 8000 steps at 3e-6)."""

    kind: Literal["pixel"] = "pixel"
    start_from: str  # a CLIP repository: PickScore, or the embedded default's
    processor: str | None = None  # repository of the tokenizer, if start_from has none
    steps: Positive = 8000
    batch_size: Positive = 64
    learning_rate: Rate = 3e-6
    preprocessing: Literal["antialias", "published"] = "antialias"
    blind: bool = False  # gets t = 0 in training and in use: the paper's ablation

    def repositories(self) -> dict[str, tuple[str, str | None]]:
        if self.checkpoint:
            return {"checkpoint": (self.checkpoint, "config.json")}
        processor = {"processor": (self.processor, None)} if self.processor else {}
        return {"start_from": (self.start_from, "config.json"), **processor}

    def forwards_per_pair(self, sampling: SamplingConfig) -> float:
        """The base predicts the x_0 of both images."""
        return 2.0 * (1 + (sampling.guidance_scale > 1))

    def unfit(self, scoring: ScoringConfig) -> str | None:
        if scoring.at_step_time:
            return "at_step_time=true needs a preference model of kind latent"
        return None


class LatentPreferenceConfig(TrainPreferenceConfig):
    """LRM, which reads noisy latents (LPO, arXiv 2502.01051; published settings for SD v1.5 as defaults).

    For SDXL: 8000 steps of 32 pairs, 1000 of warm-up.
    """

    reads_x_0: ClassVar[bool] = False

    kind: Literal["latent"] = "latent"
    checkpoint_base: str | None = None  # the diffusers model that `checkpoint` is of, if it has the published layout
    text_projection: str | None = None  # SD v1.5: a CLIP from whose projection the text's starts; None: random
    # published: openai/clip-vit-large-patch14
    projection_size: Positive | None = None  # None: the text encoder's, 768 for SD v1.5 and 1280 for SDXL
    guidance_scale: Annotated[float, Field(ge=1)] = 7.5  # of the last block's features; 1: none, and half the work
    layers: Positive | None = None  # of sd3 and flux: joint blocks of the transformer; None: 3/4, 18 of SD3's 24 (LPO)
    noise_per: Literal["image", "pair"] = "image"  # whether a pair's two images are noised each in its own way
    timestep_stride: Positive = 50  # t is drawn from 1, 1 + stride, ... (1, 51, ..., 951); 1: from all timesteps
    steps: Positive = 4000
    batch_size: Positive = 128
    learning_rate: Rate = 1e-5
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0

    @model_validator(mode="after")
    def _base_of_a_checkpoint(self) -> "LatentPreferenceConfig":
        if self.checkpoint_base and not self.checkpoint:
            raise ValueError("checkpoint_base needs a checkpoint in the published layout; name one, or remove it")
        return self

    def repositories(self) -> dict[str, tuple[str, str | None]]:
        if self.checkpoint and self.checkpoint_base:
            base = {"checkpoint_base": (self.checkpoint_base, "model_index.json")}
            return {"checkpoint": (self.checkpoint, "state_dict.pt"), **base}
        if self.checkpoint:
            return {"checkpoint": (self.checkpoint, "config.json")}
        return {"text_projection": (self.text_projection, "config.json")} if self.text_projection else {}

    def forwards_per_pair(self, sampling: SamplingConfig) -> float:
        """A pass of both images through the model's half of a UNet counts as half of one; the base makes none."""
        return 2.0 * (1 + (self.guidance_scale > 1)) / 2

    def unfit(self, scoring: ScoringConfig) -> str | None:
        for key in ("tiny_vae", "timestep"):
            if getattr(scoring, key) is not None:
                return f"{key}={getattr(scoring, key)!r} needs a preference model of kind pixel"
        return None


class CustomPreferenceConfig(TrainPreferenceConfig):
    """A class of the user's own that scores images; it is not trained here (spo/preference/reward.py)."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    kind: Literal["custom"]
    class_name: Annotated[str, Field(alias="class", pattern=r"^[A-Za-z_]\w*:[A-Za-z_]\w*$")]  # MODULE:CLASS
    options: dict[str, Any] = Field(default_factory=dict)  # keyword arguments of the class
    steps: Positive = 1
    batch_size: Positive = 64  # pairs that are measured at a time
    learning_rate: Rate = 1.0

    @property
    def is_trained(self) -> bool:
        return True

    @model_validator(mode="after")
    def _not_trained(self) -> "CustomPreferenceConfig":
        unused = {"checkpoint", "filter", "labels", "steps", "learning_rate"} & self.model_fields_set
        if changed := sorted(name for name in unused if getattr(self, name) != type(self).model_fields[name].default):
            raise ValueError(f"a preference model of kind custom is not trained, so remove {', '.join(changed)}")
        return self

    def repositories(self) -> dict[str, tuple[str, str | None]]:
        return {}

    def forwards_per_pair(self, sampling: SamplingConfig) -> float:
        return 0.0

    def unfit(self, scoring: ScoringConfig) -> str | None:
        for key, default in (("timestep", None), ("at_step_time", False), ("dtype", "float32")):
            if (value := getattr(scoring, key)) != default:
                return f"{key}={value!r} is not for a preference model of kind custom"
        return None


def _kind(value: Any) -> Any:
    kind = value.get("kind", "pixel") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None


PreferenceConfig = Annotated[
    Annotated[PixelPreferenceConfig, Tag("pixel")]
    | Annotated[LatentPreferenceConfig, Tag("latent")]
    | Annotated[CustomPreferenceConfig, Tag("custom")],
    Discriminator(
        _kind, custom_error_type="kind", custom_error_message="give a section whose kind is pixel, latent or custom"
    ),
]
