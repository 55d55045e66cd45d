"""Metrics by a plain CLIP, such as PickScore and CLIPScore."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from spo.config import ClipMetricConfig
from spo.data.prompt_lengths import longer_than
from spo.preference.repository import read_clip, read_processor, tokenize


class Clip:
    """A CLIP with the tokenizer and preprocessing of a repository; its features are unit vectors in float32.

    model: has the weights, None for those of the repository; processor: has the tokenizer, None for the repository's.
    """

    def __init__(
        self, repository: str, device: torch.device, *, processor: str | None = None, model: CLIPModel | None = None
    ):
        _, self.tokenizer, self.preprocess = read_processor(repository, processor)
        self.model = (model or read_clip(repository)).to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """(n, d) of images (n, 3, H, W) in [0, 1]."""
        output = self.model.get_image_features(pixel_values=self.preprocess(images.to(self.device)))
        return F.normalize(output.pooler_output, dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(n, d); prompts longer than the model's context are cut."""
        tokens = tokenize(self.tokenizer, prompts, self.model.config).to(self.device)
        return F.normalize(self.model.get_text_features(input_ids=tokens).pooler_output, dim=-1)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are longer than the model's context."""
        context = self.model.config.text_config.max_position_embeddings
        return longer_than(context, prompts, self.tokenizer)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (n,) of each image with its prompt."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)


class ClipMetric:
    """exp(logit_scale) cos(image, prompt) of a plain CLIP: PickScore, and CLIPScore as 100 times a cosine."""

    def __init__(self, config: ClipMetricConfig, device: torch.device):
        self.name = config.name
        self.clip = Clip(config.model, device, processor=config.processor)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {self.name: (self.clip.model.logit_scale.exp() * self.clip.cosine(images, prompts)).cpu()}

    def cut(self, prompts: Sequence[str]) -> list[str]:
        return self.clip.cut(prompts)


METRIC = ClipMetric
