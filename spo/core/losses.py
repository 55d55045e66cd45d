"""The losses of the policy and of the preference model."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.core.precision import at_least_float32
from spo.core.types import Loss, Transition


def log_ratio(log_p: Tensor, log_p_ref: Tensor, *, clip_range: float | None = None) -> Tensor:
    """log(p / p_ref), with the ratio clamped to [1 - clip_range, 1 + clip_range] (SPO, section 4.3, uses 0.1).

    log_p, log_p_ref: the same shape, which the result has too. Outside the range the gradient is 0. The clamp acts on
    the logarithm, where exp cannot overflow; value and gradient equal those of the published log(clamp(exp(d))).
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

    log_ratio: (n, 2), 0 = win, 1 = lose. The loss is log 2 if the policy equals the reference. Metrics, all means
    over pairs: `logit`; `accuracy`, the share of logits > 0; `log_ratio_win` and `log_ratio_lose`.
    Raises ValueError for no pairs.
    """
    if len(log_ratio) == 0:
        raise ValueError("a loss over 0 pairs has no value; skip the update")
    win, lose = at_least_float32(log_ratio).unbind(dim=1)
    logit = beta * (win - lose)  # (n,)
    values = {"logit": logit, "accuracy": (logit > 0).float(), "log_ratio_win": win, "log_ratio_lose": lose}
    metrics = {name: value.mean().detach() for name, value in values.items()}
    return Loss(-F.logsigmoid(logit).mean(), metrics, log_ratio.detach())


def clipped_advantage_loss(ratio: Tensor, advantage: Tensor, *, clip_range: float) -> Loss:
    """-min(ratio A, clip(ratio) A), mean over examples (PPO, arXiv 1707.06347, eq. 7).

    ratio, advantage: (n,). Metrics: `ratio`, its mean; `clipped`, the share outside [1 - clip_range, 1 + clip_range].
    """
    ratio, advantage = at_least_float32(ratio), at_least_float32(advantage)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    metrics = {"ratio": ratio.mean().detach(), "clipped": (ratio != clipped).float().mean().detach()}
    return Loss(-torch.minimum(ratio * advantage, clipped * advantage).mean(), metrics)


def gaussian_divergence(policy: Transition, reference: Transition) -> Tensor:
    """KL (n,) of two transitions with the same std: |mean - mean_ref|^2 / (2 std^2), mean over (c, h, w)."""
    difference = at_least_float32(policy.mean) - at_least_float32(reference.mean)
    return (difference**2 / (2 * at_least_float32(policy.std) ** 2)).mean(dim=(-3, -2, -1))


def preference_loss(scores: Tensor, label: Tensor, weight: Tensor) -> Loss:
    """KL(label || softmax(scores)), weighted: cross-entropy minus the labels' entropy, so a tie can reach 0 too.

    (The published code adds log 0.5 for ties instead.)
    scores: (n, 2); label: (n, 2), rows sum to 1, a tie is (.5, .5); weight: (n,) >= 0, divided by its sum.
    Metric `accuracy`: weighted share of examples whose preferred image scores higher; a tie counts half.
    Raises ValueError if the weights sum to 0.
    """
    scores, label, weight = at_least_float32(scores), at_least_float32(label), at_least_float32(weight)
    if not weight.sum() > 0:
        raise ValueError(f"weights of {len(weight)} examples sum to {weight.sum():g}; at least one must be positive")
    weight = weight / weight.sum()
    divergence = (torch.xlogy(label, label) - label * F.log_softmax(scores, dim=1)).sum(dim=1)  # (n,)
    preferred = label.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)  # (n,)
    return Loss((weight * divergence).sum(), {"accuracy": (weight * preferred).sum().detach()})
