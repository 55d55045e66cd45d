"""Simple image operations, as controls: a method should gain more than any of them.

Each takes and returns images (n, 3, h, w) in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def contrast(images: Tensor, factor: float) -> Tensor:
    """Multiply distances from mid-grey by `factor`; 1 changes nothing."""
    return ((images - 0.5) * factor + 0.5).clamp(0, 1)


def saturation(images: Tensor, factor: float) -> Tensor:
    """Multiply distances from each pixel's own grey by `factor`; 1 changes nothing, 0 leaves grey."""
    weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype).view(3, 1, 1)
    grey = (images * weights).sum(dim=1, keepdim=True)
    return (grey + (images - grey) * factor).clamp(0, 1)


def gamma(images: Tensor, exponent: float) -> Tensor:
    """Raise every value to the power `exponent`; below 1 brightens."""
    return images.clamp(0, 1) ** exponent


def blur(images: Tensor, std: float) -> Tensor:
    """Gaussian blur of `std` > 0 pixels; border pixels are repeated beyond the border."""
    if std <= 0:
        raise ValueError(f"std={std} must be above 0 pixels; leave the blur out for none")
    reach = max(1, round(3 * std))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-(offsets**2) / (2 * std**2), dim=0)
    channels = images.shape[1]
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def sharpen(images: Tensor, amount: float, *, std: float = 1.5) -> Tensor:
    """Unsharp mask: add `amount` times the difference to a blur of `std` pixels."""
    return (images + amount * (images - blur(images, std))).clamp(0, 1)
