"""Images in [0, 1] to normalised pixels for a CLIP, in the same way for training, sampling and evaluation.

The published code has two versions, which differ in the order of clamp, resize and crop; ours is that of its sampling.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

Channels = tuple[float, ...]  # red, green, blue
Mode = Literal["antialias", "published"]


@dataclass(frozen=True)
class Preprocessing:
    """Bicubic resize of the shortest side to `size`, centre crop, clamp to [0, 1], normalise.

    `antialias` resizes like CLIP's image processor; `published` does not antialias, like the published code, and is
    for checkpoints that were trained so. An image of `size` x `size` is not resized.
    """

    size: int  # pixels
    mean: Channels = tuple(OPENAI_CLIP_MEAN)
    std: Channels = tuple(OPENAI_CLIP_STD)
    mode: Mode = "antialias"

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised pixels (n, 3, size, size), float32, of images (n, 3, H, W) in [0, 1].

        ValueError for another number of axes or channels.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; give (n, 3, H, W)")
        images = _centre_crop(self._resize(images.float()), self.size).clamp(0, 1)
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def _resize(self, images: Tensor) -> Tensor:
        shortest = min(images.shape[-2:])
        if shortest == self.size:
            return images
        scale = self.size / shortest  # rounded before it is used, as in the published code
        size = [int(side * scale + 0.5) for side in images.shape[-2:]]
        return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=self.mode == "antialias")


def _centre_crop(images: Tensor, size: int) -> Tensor:
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]
