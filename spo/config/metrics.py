"""The judges of pictures."""

from typing import Annotated, Literal

from pydantic import Field

from spo.config.base import Section


class OracleConfig(Section):
    """The judge of the drawn world; its scores are `aesthetic`, `alignment` and their factors."""

    kind: Literal["oracle"] = "oracle"

    @property
    def scores(self) -> tuple[str, ...]:
        return ("aesthetic", "alignment")


class OneScore(Section):
    """A judge with one score, which has the judge's name."""

    name: str

    @property
    def scores(self) -> tuple[str, ...]:
        return (self.name,)


class ClipMetricConfig(OneScore):
    """A CLIP's score of image and prompt: PickScore, CLIPScore and their like, named by their repository."""

    kind: Literal["clip"] = "clip"
    name: str  # of the score, e.g. pickscore
    model: str  # a CLIP repository
    processor: str | None = None  # tokenizer's repository, where `model` has none


class HpsConfig(OneScore):
    """HPSv2.1, as published: an OpenCLIP checkpoint, and the CLIP whose configuration and tokenizer it has."""

    kind: Literal["hpsv2"] = "hpsv2"
    name: str = "hpsv2"
    weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"  # a file here, or OWNER/NAME/FILE of the hub
    clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class AestheticConfig(OneScore):
    """LAION's aesthetic predictor: published linear layers on the features of a CLIP."""

    kind: Literal["laion_aesthetic"] = "laion_aesthetic"
    name: str = "laion_aesthetic"
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"  # a file here, or OWNER/NAME/FILE of the hub
    clip: str = "openai/clip-vit-large-patch14"


class ImageRewardConfig(OneScore):
    """ImageReward, as published, and the tokenizer of its text encoder."""

    kind: Literal["image_reward"] = "image_reward"
    name: str = "image_reward"
    weights: str = "THUDM/ImageReward/ImageReward.pt"  # a file here, or OWNER/NAME/FILE of the hub
    tokenizer: str = "google-bert/bert-base-uncased"


MetricConfig = Annotated[
    OracleConfig | ClipMetricConfig | HpsConfig | AestheticConfig | ImageRewardConfig, Field(discriminator="kind")
]
