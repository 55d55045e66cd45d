"""ImageReward (arXiv 2304.05977): BLIP encodes prompt and image together; a head turns the result into a score.

The published package needs old versions of its libraries, so its weights are loaded into transformers' BLIP, whose
weights have other names.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from spo.config import ImageRewardConfig
from spo.data.prompt_lengths import longer_than
from spo.errors import ModelError, one_line
from spo.metrics.weights import fetch_file, fill, linear_head, read_tensors
from spo.preference.preprocess import Preprocessing
from spo.runtime import hub

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the published rewards
TOKENS = 35
HEAD_SIZE = 64  # of an attention head, in BERT-base and ViT-L alike
VISION = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "post_layernorm": "norm",
    ".self_attn.projection": ".attn.proj",
    ".self_attn.qkv": ".attn.qkv",
    ".layer_norm1": ".norm1",
    ".layer_norm2": ".norm2",
}


class ImageRewardMetric:
    """Standardised rewards: over the published data the mean is 0 and the deviation 1."""

    def __init__(self, config: ImageRewardConfig, device: torch.device):
        self.name = config.name
        path = fetch_file(config.weights)
        state = read_tensors(path)
        self.device = device
        try:
            self.vision = _vision(_part(state, "blip.visual_encoder.", path), path).to(device)
            self.text = _text(_part(state, "blip.text_encoder.", path), path).to(device)
        except KeyError as error:
            raise ModelError(f"{path} lacks the weight {error}; give the published ImageReward.pt") from None
        self.head = linear_head(state, "mlp.layers.", path).to(device)
        self.preprocess = Preprocessing(size=self.vision.config.image_size)
        if not Path(config.tokenizer).is_dir():
            hub.connect()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        except (OSError, ValueError) as error:
            raise ModelError(f"the tokenizer {config.tokenizer} cannot be loaded: {one_line(error, 160)}") from None

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).to(self.device)
        seen = self.vision(pixel_values=self.preprocess(images.to(self.device))).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return {self.name: ((self.head(read[:, 0])[:, 0] - MEAN) / STD).cpu()}

    def cut(self, prompts: Sequence[str]) -> list[str]:
        return longer_than(TOKENS, prompts, self.tokenizer)


def _part(state: Mapping[str, Tensor], prefix: str, source: object) -> dict[str, Tensor]:
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    part.pop("embeddings.position_ids", None)  # of older transformers: 0, 1, ...
    if not part:
        raise ModelError(f"{source} holds nothing under {prefix}; give the published ImageReward.pt")
    return part


def _vision(state: dict[str, Tensor], source: object) -> BlipVisionModel:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(state, r"blocks\.(\d+)\."),
        num_attention_heads=width // HEAD_SIZE,
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # BLIP's, which differs from transformers' default
    )
    with init_empty_weights():
        model = BlipVisionModel(config)
    renamed = {name: state[_published(name)] for name in model.state_dict() if _published(name) in state}
    fill(model, renamed, source)
    return model


def _text(state: dict[str, Tensor], source: object) -> BlipTextModel:
    tokens, width = state["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(state, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=width // HEAD_SIZE,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
    )
    with init_empty_weights():
        model = BlipTextModel(config, add_pooling_layer=False)
    fill(model, {name: value for name, value in state.items() if not name.startswith("pooler.")}, source)
    return model


def _published(name: str) -> str:
    for ours, theirs in VISION.items():
        name = name.replace(ours, theirs)
    return name


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))


METRIC = ImageRewardMetric
