"""Convert the weights of an OpenCLIP checkpoint to those of transformers' CLIP."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from spo.errors import ModelError

NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
}
INNER = {
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}  # transposed
PARTS = ("q_proj", "k_proj", "v_proj")  # one tensor in OpenCLIP


def from_open_clip(state: Mapping[str, Tensor], names: Mapping[str, object]) -> dict[str, Tensor]:
    """The weights `names` of a transformers CLIPModel, from an OpenCLIP state dict; ModelError if one is missing."""
    try:
        return {name: _weight(state, name) for name in names}
    except KeyError as error:
        raise ModelError(f"an OpenCLIP checkpoint should hold {error}; this file does not") from None


def _weight(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name in PROJECTIONS:
        return state[PROJECTIONS[name]].T.contiguous()
    for ours, theirs in NAMES.items():
        if name.startswith(ours):
            renamed = theirs + name.removeprefix(ours)
            break
    else:
        return state[name]  # logit_scale
    if found := re.search(r"\.self_attn\.([qkv]_proj)\.(weight|bias)$", renamed):
        whole = state[f"{renamed[: found.start()]}.attn.in_proj_{found[2]}"]
        return torch.chunk(whole, 3)[PARTS.index(found[1])].clone()
    for ours, theirs in INNER.items():
        renamed = renamed.replace(ours, theirs)
    return state[renamed]
