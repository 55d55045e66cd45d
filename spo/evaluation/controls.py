"""The control: what the best change of contrast alone makes of the base's images."""

from torch import Tensor


def contrast(images: Tensor, factor: float) -> Tensor:
    """Images (n, 3, h, w) in [0, 1] with their distances from mid-grey times `factor`; 1 changes nothing."""
    return ((images - 0.5) * factor + 0.5).clamp(0, 1)
