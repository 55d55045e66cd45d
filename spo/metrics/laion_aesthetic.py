"""LAION's aesthetic predictor: published linear layers on the features of a CLIP."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spo.config import AestheticConfig
from spo.metrics.clip import Clip
from spo.metrics.weights import fetch_file, linear_head, read_tensors


class AestheticMetric:
    """LAION's aesthetic predictor, on CLIP ViT-L/14 features; its scores are about 1 to 10."""

    def __init__(self, config: AestheticConfig, device: torch.device):
        self.name = config.name
        path = fetch_file(config.head)
        self.head = linear_head(read_tensors(path), "layers.", path).to(device)
        self.clip = Clip(config.clip, device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {self.name: self.head(self.clip.image_features(images))[:, 0].cpu()}


METRIC = AestheticMetric
