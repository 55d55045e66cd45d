"""The scores of an image for its prompt: the drawn world's oracle, or CLIPs such as PickScore."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from spo.config import ClipMetricConfig, MetricConfig, OracleConfig
from spo.evaluation.oracle import judge
from spo.preference.checkpoint import load_clip
from spo.preference.score import PreferenceScorer

Scores = dict[str, Tensor]  # each (n,), on the CPU
JUDGED_AT_A_TIME = 64


class Metric(Protocol):
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Named scores (n,) of images (n, 3, H, W) in [0, 1], on the CPU."""
        ...


class ClipMetric:
    """exp(logit_scale) cos(image, prompt) of a plain CLIP: PickScore and CLIPScore are of this form."""

    def __init__(self, config: ClipMetricConfig, device: torch.device):
        self.name = config.name
        self.scorer = PreferenceScorer(load_clip(config.model, processor=config.processor), device=device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        text = self.scorer.encode(prompts)
        return {self.name: self.scorer(images, text, torch.zeros((), dtype=torch.long)).cpu()}


def build_metrics(configs: Sequence[MetricConfig], device: torch.device) -> list[Metric]:
    """Load them; ModelError where weights are absent."""
    return [_build(config, device) for config in configs]


def _build(config: MetricConfig, device: torch.device) -> Metric:
    match config:
        case OracleConfig():
            return judge
        case ClipMetricConfig():
            return ClipMetric(config, device)


def score(metrics: Sequence[Metric], images: Tensor, prompts: Sequence[str]) -> Scores:
    """All scores (n,) of images (n, 3, H, W)."""
    scores: Scores = {}
    for metric in metrics:
        starts = range(0, len(images), JUDGED_AT_A_TIME)
        parts = [metric(images[i : i + JUDGED_AT_A_TIME], list(prompts[i : i + JUDGED_AT_A_TIME])) for i in starts]
        scores |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return scores
