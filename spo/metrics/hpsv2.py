"""HPSv2.1 (arXiv 2306.09341): an OpenCLIP ViT-H/14 tuned on preferences."""

from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPModel

from spo.config import HpsConfig
from spo.metrics.clip import Clip
from spo.metrics.open_clip import from_open_clip
from spo.metrics.weights import fetch_file, fill, read_tensors
from spo.preference.repository import read_config


class HpsMetric:
    """HPSv2.1 (arXiv 2306.09341): 100 cos(image, prompt) of an OpenCLIP ViT-H/14 tuned on preferences.

    The published code also pads images that are not square; ours are square.
    """

    def __init__(self, config: HpsConfig, device: torch.device):
        self.name = config.name
        with init_empty_weights():
            model = CLIPModel(read_config(config.clip))
        path = fetch_file(config.weights)
        fill(model, from_open_clip(read_tensors(path), model.state_dict()), path)
        self.clip = Clip(config.clip, device, model=model)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {self.name: (100 * self.clip.cosine(images, prompts)).cpu()}

    def cut(self, prompts: Sequence[str]) -> list[str]:
        return self.clip.cut(prompts)


METRIC = HpsMetric
