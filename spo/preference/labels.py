"""What the preference model learns: for each pair the shares (label_0, label_1), a tie being (0.5, 0.5)."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def human_labels(labels: Tensor) -> Tensor:
    """Shares (n, 2), float32, each row summing to 1, of votes or labels (n, 2) >= 0: (1, 0), (0.5, 0.5), (3, 1), ...

    ValueError where a row is negative, not finite, or (0, 0).
    """
    labels = labels.float()
    if labels.ndim != 2 or labels.shape[1] != 2:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; give (n, 2)")
    usable = labels.isfinite().all(dim=1) & (labels >= 0).all(dim=1) & (labels > 0).any(dim=1)
    if not usable.all():
        row = int((~usable).nonzero()[0])
        raise ValueError(f"labels[{row}] = {labels[row].tolist()}; give two finite numbers >= 0 that are not both 0")
    return labels / labels.sum(dim=1, keepdim=True)


def pseudo_labels(scores: Tensor, *, tie_margin: float) -> Tensor:
    """The opinion (n, 2) of a clean-image model on scores (n, 2): a one-hot winner, or a tie.

    |softmax(scores)_0 - softmax(scores)_1| > tie_margin decides; the published SDXL recipe, not in the paper, has 0.1.
    """
    share = scores.float().softmax(dim=1)
    gap = share[:, :1] - share[:, 1:]  # (n, 1) in [-1, 1]
    winner = torch.cat([gap > 0, gap < 0], dim=1).float()
    return torch.where(gap.abs() > tie_margin, winner, 0.5)


def prompt_weights(prompts: Sequence[str]) -> Tensor:
    """Weights (n,): 1 / (examples of its prompt), so that every prompt counts alike."""
    counts = Counter(prompts)
    return torch.tensor([1 / counts[prompt] for prompt in prompts])
