"""The step-aware preference model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from spo.config.base import Fraction, Positive, Rate, Section


class LabelsConfig(Section):
    """Where the labels of preference pairs come from: people, or a clean-image model's opinion (SDXL's recipe)."""

    kind: Literal["human", "pseudo"] = "human"
    model: str | None = None  # of pseudo-labels: a CLIP repository such as yuvalkirstain/PickScore_v1
    processor: str | None = None  # tokenizer's repository, where `model` has none
    tie_margin: Fraction = 0.1  # softmax gap below which a pseudo-label is a tie

    @model_validator(mode="after")
    def _pseudo_needs_model(self) -> "LabelsConfig":
        if (self.kind == "pseudo") != (self.model is not None):
            raise ValueError(
                "labels.kind=pseudo needs labels.model, e.g. yuvalkirstain/PickScore_v1, and kind=human has none"
            )
        return self


class TrainPreferenceConfig(Section):
    """The step-aware preference model (paper section 4.1; SD 1.5: 8000 steps at 3e-6)."""

    start_from: str  # a CLIP repository: PickScore, or the embedded default's
    checkpoint: str | None = None  # an already trained step-aware model: skips training
    processor: str | None = None  # tokenizer's repository, where start_from has none
    steps: Positive = 8000
    batch_size: Positive = 64
    learning_rate: Rate = 3e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    weight_decay: Annotated[float, Field(ge=0)] = 0.3
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    preprocessing: Literal["antialias", "published"] = "antialias"
    blind: bool = False  # to t, which it is then told is 0 in training and in use: the paper's ablation
    evaluate_timesteps: tuple[int, ...] = (0, 251, 501, 701, 951)  # as published
    evaluate_pairs: Positive = 512  # validation pairs that accuracy is measured on, at most
    log_every: Positive = 20
