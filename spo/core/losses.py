"""The losses of the policy and of the preference model."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.core.precision import at_least_float32
from spo.core.types import Loss


def log_ratio(log_p: Tensor, log_p_ref: Tensor, *, clip_range: float | None = None) -> Tensor:
    """log of the ratio p / p_ref, the ratio clamped to [1 - clip_range, 1 + clip_range] (SPO, section 4.3; 0.1 there).

    log_p, log_p_ref: one shape, which is returned. Outside the range the gradient is 0. The clamp is on the
    log side, where exp cannot overflow; value and gradient equal those of the published log(clamp(exp(d))).
    Raises ValueError for a clip_range outside (0, 1).
    """
    difference = at_least_float32(log_p) - at_least_float32(log_p_ref)
    if clip_range is None:
        return difference
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range={clip_range} must lie in (0, 1), or be None for no clipping; the paper uses 0.1")
    return difference.clamp(math.log1p(-clip_range), math.log1p(clip_range))


def dpo_loss(log_ratio: Tensor, *, beta: float) -> Loss:
    """-log sigmoid(beta (log ratio of win - log ratio of lose)), mean over pairs (DPO, arXiv 2305.18290, eq. 7).

    log_ratio: (n, 2), 0 = win, 1 = lose; log 2 where the policy equals the reference. Metrics, all means over
    pairs: `logit`; `accuracy`, the share of logits > 0; `log_ratio_win` and `log_ratio_lose`.
    Raises ValueError where there is no pair.
    """
    if len(log_ratio) == 0:
        raise ValueError("a loss over 0 pairs has no value; skip the update")
    win, lose = at_least_float32(log_ratio).unbind(dim=1)
    logit = beta * (win - lose)  # (n,)
    metrics = {
        "logit": logit.mean(),
        "accuracy": (logit > 0).float().mean(),
        "log_ratio_win": win.mean(),
        "log_ratio_lose": lose.mean(),
    }
    detached = {name: metric.detach() for name, metric in metrics.items()}
    return Loss(-F.logsigmoid(logit).mean(), detached, log_ratio.detach())


def preference_loss(scores: Tensor, label: Tensor, weight: Tensor) -> Loss:
    """Weighted cross-entropy of softmax(scores) against labels, less the labels' entropy: KL(label || softmax(scores)).

    So its floor is 0 for a tie, too, where the published code adds log 0.5.
    scores: (n, 2); label: (n, 2), rows summing to 1, a tie is (.5, .5); weight: (n,) >= 0, divided by its sum.
    Metric `accuracy`: weighted share of examples whose preferred image scores higher; a tie counts half.
    Raises ValueError where the weights sum to 0.
    """
    scores, label, weight = at_least_float32(scores), at_least_float32(label), at_least_float32(weight)
    if not weight.sum() > 0:
        raise ValueError(f"weights of {len(weight)} examples sum to {weight.sum():g}; at least one must be positive")
    weight = weight / weight.sum()
    divergence = (torch.xlogy(label, label) - label * F.log_softmax(scores, dim=1)).sum(dim=1)  # (n,)
    preferred = label.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)  # (n,)
    return Loss((weight * divergence).sum(), {"accuracy": (weight * preferred).sum().detach()})
