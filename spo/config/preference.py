"""Prompts and preference pairs, and the step-aware preference model that learns from the pairs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from spo.config.base import Fraction, Positive, Rate, Section


class PromptsConfig(Section):
    source: str  # a .txt, .json, .jsonl, .csv, .tsv or .parquet file
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


class TrainPreferenceConfig(Section):
    """The step-aware preference model (paper section 4.1; SD 1.5: 8000 steps at 3e-6)."""

    start_from: str  # a CLIP repository: PickScore, or the embedded default's
    checkpoint: str | None = None  # an already trained step-aware model: skips training
    processor: str | None = None  # repository of the tokenizer, if start_from has none
    steps: Positive = 8000
    batch_size: Positive = 64
    learning_rate: Rate = 3e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    weight_decay: Annotated[float, Field(ge=0)] = 0.3
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    preprocessing: Literal["antialias", "published"] = "antialias"
    blind: bool = False  # gets t = 0 in training and in use: the paper's ablation
    evaluate_timesteps: tuple[int, ...] = (0, 251, 501, 701, 951)  # as published
    evaluate_pairs: Positive = 512  # validation pairs for the accuracy, at most
    log_every: Positive = 20
