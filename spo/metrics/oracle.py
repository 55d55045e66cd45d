"""The embedded world's oracle as a metric."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spo.config import OracleConfig
from spo.world.oracle import oracle_scores


class OracleMetric:
    """`aesthetic`, `alignment` and their factors, computed exactly from the image (see spo/world/oracle.py)."""

    def __init__(self, config: OracleConfig, device: torch.device):
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return oracle_scores(images, prompts)


METRIC = OracleMetric
