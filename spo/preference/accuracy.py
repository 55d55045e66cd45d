"""How often a preference model sides with the labels."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Shares of the pairs that are not tied; nan where there is none."""

    accuracy: float
    num_pairs: int


def pairwise_accuracy(scores: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of scores (n, 2) on labels (n, 2).

    Tied pairs do not count. Equal scores count half, so that a model without opinion has 0.5; the published code
    counts them as wrong. ValueError where the shapes do not fit.
    """
    if scores.shape != labels.shape or scores.ndim != 2 or scores.shape[1] != 2:
        raise ValueError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} must both be (n, 2)")
    wanted = torch.sign(labels[:, 0] - labels[:, 1])
    given = torch.sign(scores[:, 0] - scores[:, 1])
    correct = (1 + wanted * given) / 2  # 1, 0, or 0.5 for equal scores
    decided = wanted != 0
    return Accuracy(correct[decided].float().mean().item(), int(decided.sum()))
