"""The metrics of evaluation, which measure images."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from spo.config.base import Section


class MetricSection(Section):
    """Settings of a metric. Class variables name the fields that hold repositories and files, local or on the hub."""

    models: ClassVar[tuple[str, ...]] = ()  # repositories of a model: folders, or OWNER/NAME of the hub
    tokenizers: ClassVar[tuple[str, ...]] = ()  # repositories of a tokenizer
    files: ClassVar[tuple[str, ...]] = ()  # weights: files, or OWNER/NAME/FILE of the hub

    @property
    def sources(self) -> list[str]:
        """All repositories and files of the metric."""
        named = (getattr(self, field) for field in (*self.models, *self.tokenizers, *self.files))
        return [source for source in named if source is not None]


class OracleConfig(MetricSection):
    """The exact metric of the embedded world; its scores are `aesthetic`, `alignment` and their factors."""

    kind: Literal["oracle"] = "oracle"

    @property
    def scores(self) -> tuple[str, ...]:
        return ("aesthetic", "alignment")


class OneScore(MetricSection):
    """A metric with one score, which has the metric's name."""

    name: str

    @property
    def scores(self) -> tuple[str, ...]:
        return (self.name,)


class ClipMetricConfig(OneScore):
    """A CLIP's score of image and prompt, e.g. PickScore or CLIPScore."""

    models = ("model",)
    tokenizers = ("processor",)
    kind: Literal["clip"] = "clip"
    name: str  # of the score, e.g. pickscore
    model: str  # a CLIP repository
    processor: str | None = None  # repository of the tokenizer, if `model` has none


class HpsConfig(OneScore):
    """HPSv2.1, as published: an OpenCLIP checkpoint, and the CLIP that has its configuration and tokenizer."""

    models = ("clip",)
    files = ("weights",)
    kind: Literal["hpsv2"] = "hpsv2"
    name: str = "hpsv2"
    weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class AestheticConfig(OneScore):
    """LAION's aesthetic predictor: published linear layers on the features of a CLIP."""

    models = ("clip",)
    files = ("head",)
    kind: Literal["laion_aesthetic"] = "laion_aesthetic"
    name: str = "laion_aesthetic"
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
    clip: str = "openai/clip-vit-large-patch14"


class ImageRewardConfig(OneScore):
    """ImageReward, as published, and the tokenizer of its text encoder."""

    tokenizers = ("tokenizer",)
    files = ("weights",)
    kind: Literal["image_reward"] = "image_reward"
    name: str = "image_reward"
    weights: str = "THUDM/ImageReward/ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"


MetricConfig = Annotated[
    OracleConfig | ClipMetricConfig | HpsConfig | AestheticConfig | ImageRewardConfig, Field(discriminator="kind")
]


def split_hub_file(source: str) -> tuple[str, str] | None:
    """OWNER/NAME and FILE of a file on the hub; None if `source` has another form or its folder exists here."""
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)/(.+)", source)
    return (found[1], found[2]) if found and not Path(source).parent.is_dir() else None
