"""Single-file checkpoints of a tiny Stable Diffusion, with the names that web user interfaces use (CompVis' LDM)."""

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
}
ENDS |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
VAE = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipeline: StableDiffusionPipeline, file: Path, **more: Tensor) -> None:
    """Write a pipeline of two levels with one layer each, as tests.models.tiny makes it."""
    state = {f"model.diffusion_model.{_unet(name)}": weight for name, weight in pipeline.unet.state_dict().items()}
    for name, weight in pipeline.vae.state_dict().items():
        is_projection = ".attentions." in name and weight.ndim == 2  # LDM has convolutions there
        state[f"first_stage_model.{_vae(name)}"] = weight[:, :, None, None] if is_projection else weight
    text = {name.removeprefix("text_model."): weight for name, weight in pipeline.text_encoder.state_dict().items()}
    state |= {f"cond_stage_model.transformer.text_model.{name}": weight for name, weight in text.items()}
    save_file({name: weight.contiguous() for name, weight in (state | more).items()}, file)


def _unet(name: str) -> str:
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    kind, level, part, number, rest = _split(name)
    if part == "resnets":
        layer, _, end = rest.rpartition(".")
        rest = f"{RESNET[layer]}.{end}"
    attends = int(part == "attentions")
    if kind == "mid":
        return f"middle_block.{1 if attends else 2 * number}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{2 * level + 2}.0.{rest.replace('conv.', 'op.', 1)}"
    if kind == "down":
        return f"input_blocks.{2 * level + 1}.{attends}.{rest}"
    if part == "upsamplers":
        return f"output_blocks.{2 * level + 1}.{2 if level == 0 else 1}.{rest}"
    return f"output_blocks.{2 * level + number}.{attends}.{rest}"


def _vae(name: str) -> str:
    side, _, inner = name.partition(".")
    inner = inner.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if not re.match("(down|up|mid)_block", inner):
        return f"{side}.{inner}"
    kind, level, part, number, rest = _split(inner)
    if part == "attentions":
        layer, _, end = rest.rpartition(".")
        return f"{side}.mid.attn_1.{VAE[layer]}.{end}"
    if kind == "mid":
        return f"{side}.mid.block_{number + 1}.{rest}"
    level = 1 - level if kind == "up" else level
    place = f"block.{number}" if part == "resnets" else part.removesuffix("rs")  # downsample, upsample
    return f"{side}.{kind}.{level}.{place}.{rest}"


def _split(name: str) -> tuple[str, int, str, int, str]:
    found = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
    assert found, name
    return found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
