"""Labels of preference pairs: the shares (label_0, label_1) of each pair, (0.5, 0.5) for a tie."""

from collections.abc import Sequence

import torch
from torch import Tensor


def human_labels(labels: Tensor) -> Tensor:
    """Shares (n, 2), float32, whose rows sum to 1, of votes or labels (n, 2) >= 0: (1, 0), (0.5, 0.5), (3, 1), ...

    ValueError if a row is negative, not finite, or (0, 0).
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
    """Labels (n, 2) by a clean-image model's scores (n, 2): a one-hot winner, or a tie.

    There is a winner if |softmax(scores)_0 - softmax(scores)_1| > tie_margin; the published SDXL code, not the paper,
    uses 0.1.
    """
    share = scores.float().softmax(dim=1)
    gap = share[:, :1] - share[:, 1:]  # (n, 1) in [-1, 1]
    winner = torch.cat([gap > 0, gap < 0], dim=1).float()
    return torch.where(gap.abs() > tie_margin, winner, 0.5)


def prompt_weights(prompts: Sequence[str]) -> Tensor:
    """Weights (n,): 1 / (examples with this prompt), so that all prompts count the same."""
    numbers: dict[str, int] = {}
    number = torch.tensor([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=torch.long)
    return 1 / number.bincount()[number]


def pairwise_accuracy(scores: Tensor, labels: Tensor) -> tuple[float, int]:
    """The share of pairs that scores (n, 2) order as labels (n, 2) do, and the number of pairs.

    Tied pairs do not count; without others the share is nan. Equal scores count half, so a model without preference
    has 0.5; the published code counts them as wrong. ValueError if the shapes do not fit.
    """
    if scores.shape != labels.shape or scores.ndim != 2 or scores.shape[1] != 2:
        raise ValueError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} must both be (n, 2)")
    expected = torch.sign(labels[:, 0] - labels[:, 1])
    given = torch.sign(scores[:, 0] - scores[:, 1])
    correct = (1 + expected * given) / 2  # 1, 0, or 0.5 for equal scores
    decided = expected != 0
    return correct[decided].float().mean().item(), int(decided.sum())
