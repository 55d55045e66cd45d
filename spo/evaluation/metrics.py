"""The scores of an image for its prompt: the drawn world's oracle, or published judges of real pictures."""

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from spo.config import (
    AestheticConfig,
    ClipMetricConfig,
    HpsConfig,
    ImageRewardConfig,
    MetricConfig,
    OracleConfig,
)
from spo.errors import ModelError
from spo.evaluation.clip_scores import AestheticMetric, ClipMetric, HpsMetric
from spo.evaluation.image_reward import ImageRewardMetric
from spo.evaluation.oracle import judge

Scores = dict[str, Tensor]  # each (n,), on the CPU
JUDGED_AT_A_TIME = 64


class Metric(Protocol):
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Named scores (n,) of images (n, 3, H, W) in [0, 1], on the CPU."""
        ...


def build_metrics(
    configs: Sequence[MetricConfig], device: torch.device, *, needed: Collection[str] | None = None
) -> list[Metric]:
    """Load them. Where weights are absent it is a ModelError if a score is `needed` (None: all are), else a line."""
    metrics = []
    for config in configs:
        try:
            metrics.append(_build(config, device))
        except ModelError as error:
            if needed is None or set(config.scores) & set(needed):
                raise
            print(f"{', '.join(config.scores)}: left out, {error}", flush=True)
    return metrics


def _build(config: MetricConfig, device: torch.device) -> Metric:
    match config:
        case OracleConfig():
            return judge
        case ClipMetricConfig():
            return ClipMetric(config, device)
        case HpsConfig():
            return HpsMetric(config, device)
        case AestheticConfig():
            return AestheticMetric(config, device)
        case ImageRewardConfig():
            return ImageRewardMetric(config, device)


def score(metrics: Sequence[Metric], images: Tensor, prompts: Sequence[str]) -> Scores:
    """All scores (n,) of images (n, 3, H, W)."""
    scores: Scores = {}
    for metric in metrics:
        starts = range(0, len(images), JUDGED_AT_A_TIME)
        parts = [metric(images[i : i + JUDGED_AT_A_TIME], list(prompts[i : i + JUDGED_AT_A_TIME])) for i in starts]
        scores |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return scores
