"""The metrics of a profile: a metric of kind `hpsv2` is the class METRIC of spo/metrics/hpsv2.py.

A new metric needs that module, its section in spo/config/metrics.py, and a profile that names it.
"""

import importlib
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from spo.config import MetricConfig
from spo.errors import ModelError

Scores = dict[str, Tensor]  # each (n,), on the CPU
IMAGES_AT_A_TIME = 64


class Metric(Protocol):
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Named scores (n,) of images (n, 3, H, W) in [0, 1], on the CPU.

        A metric with a text encoder may also have `cut(prompts)`, which gives the prompts that the encoder cuts.
        """
        ...


def build_metrics(
    configs: Sequence[MetricConfig], device: torch.device, *, needed: Collection[str] | None = None
) -> list[Metric]:
    """Load the metrics. One without weights is skipped with a message; ModelError if one of its scores is `needed`.

    needed: names of scores; None: all.
    """
    metrics = []
    for config in configs:
        try:
            metrics.append(importlib.import_module(f"spo.metrics.{config.kind}").METRIC(config, device))
        except ModelError as error:
            if needed is None or set(config.scores) & set(needed):
                raise
            print(f"{', '.join(config.scores)}: left out, {error}", flush=True)
    return metrics


def cut_prompts(metrics: Sequence[Metric], prompts: Sequence[str]) -> dict[str, list[str]]:
    """By a metric's name, the prompts that its text encoder cuts; only metrics that cut any."""
    found = {getattr(each, "name", ""): each.cut(prompts) for each in metrics if hasattr(each, "cut")}
    return {name: cut for name, cut in found.items() if cut}


def score(metrics: Sequence[Metric], images: Tensor, prompts: Sequence[str]) -> Scores:
    """All scores (n,) of images (n, 3, H, W) with prompts (n); ModelError for one that is not finite."""
    scores: Scores = {}
    for metric in metrics:
        starts = range(0, len(images), IMAGES_AT_A_TIME)
        parts = [metric(images[i : i + IMAGES_AT_A_TIME], list(prompts[i : i + IMAGES_AT_A_TIME])) for i in starts]
        scores |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, values in scores.items():
        if len(bad := (~values.isfinite()).nonzero()):
            prompt, value = prompts[int(bad[0])], values[bad[0]].item()
            raise ModelError(
                f"the score {name} of {prompt!r} is {value}; leave its metric out, or give it other weights"
            )
    return scores
