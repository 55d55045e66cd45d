"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""

from torch import Tensor


def guide(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """negative + scale * (positive - negative): any one shape; scale 1 is no guidance, SPO's is 5."""
    return negative + scale * (positive - negative)
