"""The embedded default's autoencoder: an AutoencoderKL (f8) small enough to decode every candidate on a laptop.

Trained from random weights on a CPU, so small a KL-VAE loses colour: its group norms divide away the
absolute level. It therefore starts as a linear block-mean autoencoder, carried through the residual
shortcuts in pairs of channels (+r, -r, +g, -g, +b, -b, and a constant pair), and learns the rest from there.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from spo.world.pretraining.recipe import Recipe
from spo.world.pretraining.updates import updates
from spo.world.scenes import all_scenes, draw_attributes, draw_quality, render

CARRIED = 8  # channels of the linear path: +-r, +-g, +-b, +-constant
CONSTANT = 1.5


def new_vae(*, channels: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """An untrained autoencoder at the block-mean start; images are 64 px, latents 8 x 8."""
    levels = len(channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
    )
    _start_as_block_mean(vae, latent_channels)
    return vae


@torch.no_grad()
def _start_as_block_mean(vae: AutoencoderKL, latent_channels: int) -> None:
    moments, latents = vae.quant_conv, vae.post_quant_conv
    for convolution in (moments, latents):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    for name, module in vae.named_modules():
        if name.endswith("conv2"):  # residual branches start at zero
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith("conv_shortcut"):
            module.weight.mul_(0.3)
            module.weight[:CARRIED] = 0
            module.weight[CARRIED:, :CARRIED] = 0
            module.weight[range(CARRIED), range(CARRIED)] = 1
            nn.init.zeros_(module.bias)
        elif "downsamplers" in name and name.endswith("conv"):  # 2 x 2 mean
            module.weight[:CARRIED] = 0
            module.bias[:CARRIED] = 0
            for c in range(CARRIED):
                module.weight[c, c, :2, :2] = 0.25
        elif "upsamplers" in name and name.endswith("conv"):  # copy
            module.weight[:CARRIED] = 0
            module.bias[:CARRIED] = 0
            module.weight[range(CARRIED), range(CARRIED), 1, 1] = 1
    for convolution, rows in ((vae.encoder.conv_in, slice(None)), (vae.decoder.conv_in, slice(CARRIED))):
        convolution.weight[rows] = 0
        convolution.bias[rows] = 0
        _split_signs(convolution)
    for c in range(latent_channels):
        moments.weight[c, c] = latents.weight[c, c] = 1
        moments.weight[latent_channels + c, latent_channels + c] = 0.1
    moments.bias[latent_channels:] = -6  # a small posterior variance
    _join_signs(vae.encoder.conv_out, keep=latent_channels)
    vae.encoder.conv_out.weight[latent_channels:] *= 0.1
    vae.decoder.conv_out.weight *= 0.05
    _join_signs(vae.decoder.conv_out, keep=3)


def _split_signs(convolution: nn.Conv2d) -> None:
    """Channels 2c and 2c + 1 take +colour and -colour, the last two a constant: silu(a) - silu(-a) = a."""
    assert convolution.bias is not None
    for colour in range(3):
        convolution.weight[2 * colour, colour, 1, 1] = 1
        convolution.weight[2 * colour + 1, colour, 1, 1] = -1
    convolution.bias[6], convolution.bias[7] = CONSTANT, -CONSTANT


def _join_signs(convolution: nn.Conv2d, *, keep: int) -> None:
    assert convolution.bias is not None
    convolution.weight[:3] = 0
    nn.init.zeros_(convolution.bias)
    for colour in range(3):
        convolution.weight[colour, 2 * colour, 1, 1] = 1
        convolution.weight[colour, 2 * colour + 1, 1, 1] = -1


def draw_batch(n: int, generator: Generator) -> Tensor:
    """Pictures (n, 3, 64, 64) in [-1, 1] of random scenes, a quarter of them well made."""
    scenes = all_scenes()
    chosen = torch.randint(len(scenes), (n,), generator=generator).tolist()
    quality = draw_quality(n, generator)
    quality[: n // 4] = draw_quality(n // 4, generator, flaw=0.1)
    return 2 * render(draw_attributes([scenes[i] for i in chosen], generator), quality, generator) - 1


@torch.no_grad()
def calibrate(vae: AutoencoderKL, generator: Generator) -> None:
    """Set the linear path's gains so that the start reproduces block means."""
    pictures = draw_batch(64, generator)
    means = F.avg_pool2d(pictures, 8)
    latents = vae.encode(pictures).latent_dist.mean[:, :3]
    vae.encoder.conv_out.weight[:3] *= (latents * means).sum() / (latents**2).sum()
    decoded = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    vae.decoder.conv_out.weight *= (decoded * pictures).sum() / (decoded**2).sum()


def train_vae(vae: AutoencoderKL, recipe: Recipe, generator: Generator) -> Iterator[dict[str, float]]:
    """Train in place on freshly drawn pictures; yields each step's losses.

    Loss: mean |y - x| + 2 mean (y - x)^2 + kl_weight KL.
    """
    calibrate(vae, generator)
    rate = recipe.vae_rate
    for update in updates(list(vae.parameters()), recipe.vae_steps, rate, warm_up=100, floor=0.03, weight_decay=1e-4):
        pictures = draw_batch(recipe.vae_batch, generator)
        posterior = vae.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(latents).sample
        error = (decoded - pictures).abs().mean()
        kl = posterior.kl().mean() / latents[0].numel()
        update(error + 2 * F.mse_loss(decoded, pictures) + recipe.kl_weight * kl)
        yield {"error": error.item(), "kl": kl.item()}


@torch.no_grad()
def finish_vae(vae: AutoencoderKL, generator: Generator) -> None:
    """Scale and shift each latent channel to mean 0 and deviation 1, within the (post-)quantising convolutions.

    The linear path's channels come out four times as large as those that carry the outlines; a diffusion model
    would learn the outlines last.
    """
    latents = vae.encode(draw_batch(256, generator)).latent_dist.mean
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    moments, back = vae.quant_conv, vae.post_quant_conv
    back.bias += (back.weight.flatten(1) * mean).sum(dim=1)
    back.weight *= std.view(1, -1, 1, 1)
    moments.bias[:channels] = (moments.bias[:channels] - mean) / std
    moments.weight[:channels] /= std.view(-1, 1, 1, 1)
    moments.bias[channels:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)
    vae.eval()
