"""Floating-point operations of SPO, counted on the real shapes, and what they cost in time.

    python -m bench.flops                           # SD v1.5 and SDXL: operations, hours by GPU count, weights

Nothing is computed: the networks run on torch's meta device, whose tensors have shapes and no numbers. A multiply and
an add are two operations. Backward passes are counted, too; only the LoRA trains.
"""

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.markdown import table
from bench.systems import SHAPES, TOKENS, Shape, make_clip, make_network, make_vae
from spo.commands.architectures import T5_TOKENS, network_inputs
from spo.config import LoraConfig, SpoConfig
from spo.models.load import NETWORKS
from spo.models.lora import add_lora

GPU_RATE = 400e12  # FLOP/s of bfloat16: what large products reach on an H100, not its data sheet's 989e12
UTILISATION = 1.6  # times the floor: what is aimed at
FLOWS = ("sd3", "flux")
PAPER = {  # prompts, epochs and the published settings
    "sd15": (4000, 10, {"prompts_per_rollout": 40}),
    "sdxl": (4000, 10, {"prompts_per_rollout": 16}),
}


@dataclass(frozen=True)
class Flops:
    """Operations of one sample."""

    network: int  # the adapter merged or off
    network_train: int  # forward with the adapter, and backward to it
    vae_decode: int
    clip_image: int


@cache
def count(size: str, rank: int) -> Flops:
    """The operations of a size's networks."""
    shape = SHAPES[size]
    side = shape.resolution // 8
    with torch.device("meta"):
        network, vae, clip = make_network(shape).requires_grad_(False), make_vae(shape), make_clip(shape)
        latents = torch.empty(1, shape.latent_channels, side, side)
        inputs = _inputs(shape, network, latents)
        pixels = torch.empty(1, 3, shape.clip_vision["image_size"], shape.clip_vision["image_size"])
    with torch.no_grad():
        plain = _counted(lambda: network(**inputs))
        decode = _counted(lambda: vae.decode(latents))
        modulations = clip.modulations(torch.ones(1, dtype=torch.long, device="meta"))
        image = _counted(lambda: clip.modulated_features(pixels, modulations))
    add_lora(network, LoraConfig(rank=rank), seed=0)
    train = _counted(lambda: network(**inputs).sample.sum().backward())
    return Flops(plain, train, decode, image)


def batch_flops(shape: Shape, settings: SpoConfig, pairs: int, *, steps: int) -> dict[str, int]:
    """Operations of one batch by what they are for; text towers, a hundredth of a percent, are left out."""
    flops = count(_name_of(shape), settings.lora.rank)
    b, k, branch = settings.prompts_per_rollout, settings.candidates, settings.branch_steps
    branched = steps - settings.first_step
    segments = (branched - last_steps(shape)) // branch
    forwards = b * (settings.first_step + 1) + b * k * (branched - 1)
    shared = pairs // branch  # a segment's first pair shares x_t
    rows = shared + 2 * (pairs - shared)
    passes = 1 if NETWORKS[shape.family].is_distilled else 2  # of guidance
    return {
        "rollout: network": passes * forwards * flops.network,
        "rollout: VAE decode": segments * b * k * flops.vae_decode,
        "rollout: preference model": segments * b * k * flops.clip_image,
        "updates: policy": passes * rows * flops.network_train,
        "updates: reference": passes * rows * flops.network,
    }


def latent_flops(shape: Shape, settings: SpoConfig, *, steps: int) -> dict[str, int]:
    """Operations of one batch of SD v1.5 with a latent preference model, every step branched and every pair kept.

    The model scores k candidates by half a network each, with guidance; then one of them goes on.
    """
    flops = count(_name_of(shape), settings.lora.rank)
    b, pairs = settings.prompts_per_rollout, settings.prompts_per_rollout * (steps - settings.first_step)
    return {
        "rollout: network": 2 * b * steps * flops.network,
        "rollout: preference model": pairs * settings.candidates * flops.network,
        "updates: policy": 2 * pairs * flops.network_train,
        "updates: reference": 2 * pairs * flops.network,
    }


def kinds() -> str:
    """Operations of a kept pair by kind of preference model, with SD v1.5's published settings."""
    shape = SHAPES["sd15"]
    settings = SpoConfig(**shape.settings)
    pairs = settings.prompts_per_rollout * (shape.steps - settings.first_step)
    pixel = batch_flops(shape, settings, pairs, steps=shape.steps)
    latent = latent_flops(shape, settings, steps=shape.steps)
    lines = [["TFLOP a kept pair", "pixel", "latent"]]
    for name in pixel:
        lines.append([name, *(f"{found.get(name, 0) / pairs / 1e12:.1f}" for found in (pixel, latent))])
    whole = [sum(found.values()) for found in (pixel, latent)]
    lines.append(["all", *(f"{each / pairs / 1e12:.1f}" for each in whole)])
    return f"{table(lines)}\n\nlatent of pixel: {whole[1] / whole[0]:.2f}"


def last_steps(shape: Shape) -> int:
    """How many steps at the end have no density, so that no pair is made there: the last one of a flow."""
    return int(shape.family in FLOWS)


def calculator() -> str:
    """Hours of the published recipes by GPU count, at UTILISATION times the floor of GPU_RATE; all pairs kept."""
    head = ["", "TFLOP a UNet sample", "its training", "VAE decode", "CLIP image", "EFLOP in all"]
    rows = [[*head, *(f"{n} GPU" for n in (1, 4, 8))]]
    for size, (prompts, epochs, published) in PAPER.items():
        shape = SHAPES[size]
        settings = SpoConfig(**{**shape.settings, **published})
        flops = count(size, settings.lora.rank)
        b = settings.prompts_per_rollout
        batch = sum(batch_flops(shape, settings, b * (shape.steps - settings.first_step), steps=shape.steps).values())
        total = batch * prompts / b * epochs
        hours = total / GPU_RATE * UTILISATION / 3600
        each = [flops.network, flops.network_train, flops.vae_decode, flops.clip_image]
        rows.append(
            [size, *(f"{value / 1e12:.2f}" for value in each), f"{total / 1e18:.1f}"]
            + [f"{hours / n:.0f} h" for n in (1, 4, 8)]
        )
    return table(rows)


def weights() -> str:
    """Parameters and bytes of what lies in a GPU's memory before the first activation."""
    rows = [["", "UNet", "VAE", "preference model", "weights in memory", "a deep-copied reference would add"]]
    for size in PAPER:
        with torch.device("meta"):
            parts = make_network(SHAPES[size]), make_vae(SHAPES[size]), make_clip(SHAPES[size])
        unet, vae, clip = (sum(parameter.numel() for parameter in part.parameters()) for part in parts)
        bytes_ = 2 * (unet + vae) + 4 * clip
        millions = [f"{each / 1e6:.0f} M" for each in (unet, vae, clip)]
        rows.append([size, *millions, f"{bytes_ / 1e9:.1f} GB", f"{2 * unet / 1e9:.1f} GB"])
    return table(rows)


def _name_of(shape: Shape) -> str:
    return next(name for name, each in SHAPES.items() if each is shape)


def _inputs(shape: Shape, network: nn.Module, latents: torch.Tensor) -> dict[str, Any]:
    """What the network takes for one sample."""
    t5_tokens = shape.t5_tokens or T5_TOKENS.get(shape.family, 0)
    tokens = t5_tokens if shape.family == "flux" else TOKENS + t5_tokens
    return network_inputs(network, shape.family, latents, tokens)


def _counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


if __name__ == "__main__":
    print(f"{calculator()}\n\n{weights()}\n\n{kinds()}")
    sys.exit(0)
