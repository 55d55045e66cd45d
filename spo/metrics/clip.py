"""Metrics that are a plain CLIP, such as PickScore and CLIPScore."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from spo.config import ClipMetricConfig
from spo.preference.preprocess import Preprocessing
from spo.preference.repository import read_clip, read_config, read_preprocessing, read_tokenizer


class Clip:
    """A CLIP with tokenizer and preprocessing; its features have length 1, in float32 on its device."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, preprocess: Preprocessing, device: torch.device):
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.device = device

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """(n, d) of images (n, 3, H, W) in [0, 1]."""
        output = self.model.get_image_features(pixel_values=self.preprocess(images.to(self.device)))
        return F.normalize(output.pooler_output, dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(n, d); prompts longer than the model's context are cut."""
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).input_ids.to(self.device)
        return F.normalize(self.model.get_text_features(input_ids=tokens).pooler_output, dim=-1)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(n,) of each image with its prompt."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)


class ClipMetric:
    """exp(logit_scale) cos(image, prompt) of a plain CLIP: PickScore, and CLIPScore as 100 times a cosine."""

    def __init__(self, config: ClipMetricConfig, device: torch.device):
        self.name = config.name
        own = read_config(config.model)
        files = config.processor or config.model
        tokenizer, preprocess = read_tokenizer(files, own), read_preprocessing(files, own, "antialias")
        self.clip = Clip(read_clip(config.model), tokenizer, preprocess, device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {self.name: (self.clip.model.logit_scale.exp() * self.clip.cosine(images, prompts)).cpu()}


METRIC = ClipMetric
