"""The autoencoder of a latent diffusion model: images to latents and back."""

import copy

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from spo.config import sides


def images_at_once(height: int, width: int, *, on_cpu: bool) -> int:
    """Images of this size in one forward."""
    return min(16, max(1, 8 * (128 if on_cpu else 512) ** 2 // (height * width)))


class Autoencoder:
    """A frozen VAE with its scaling factor and shift.

    Args:
        vae: already on its device
        resolution: of images, in pixels: the side of a square, or width and height
        upcast: run a float16 VAE with `force_upcast` in its config in float32, as the SDXL pipeline does
    """

    def __init__(self, vae: AutoencoderKL, *, resolution: int | tuple[int, int], upcast: bool = False):
        upcast = upcast and vae.dtype == torch.float16 and vae.config.force_upcast
        self.vae = copy.deepcopy(vae).float() if upcast else vae
        self.preview: AutoencoderTiny | None = None  # decodes instead of the VAE
        self.batch_size = images_at_once(*sides(resolution), on_cpu=vae.device.type == "cpu")
        self.decodes = 0  # images decoded so far

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [0, 1], float32, of latents (b, c, h, w)."""
        vae = self.vae if self.preview is None else self.preview
        latents = (latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(vae.dtype)
        self.decodes += len(latents)
        images = [vae.decode(part).sample for part in latents.split(self.batch_size)]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (b, c, h, w), float32, of images (b, 3, H, W) in [0, 1]: the mean of the posterior."""
        parts = (2 * images - 1).to(self.vae.dtype).split(self.batch_size)
        latents = torch.cat([self.vae.encode(part).latent_dist.mean for part in parts]).float()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
