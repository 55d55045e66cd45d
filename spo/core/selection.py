"""Choose the win and the lose among the candidates, and make pairs of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spo.core.precision import at_least_float32
from spo.core.types import Conditioning, Pairs, Selection


def select_pairs(scores: Tensor, *, threshold: float) -> Selection:
    """Best and worst candidate of each prompt; kept if their softmax probabilities differ by more than threshold.

    The margin is p_win - p_lose for p = softmax([s_win, s_lose]), that is tanh((s_win - s_lose) / 2)
    (SPO, arXiv 2406.04314, section 4.2). scores: (k, b), k >= 2, higher is better; threshold in [0, 1].
    Equal scores have margin 0 and NaN scores margin NaN; neither is kept. Raises ValueError for wrong k or threshold.
    """
    if scores.ndim != 2 or len(scores) < 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; use (k, b) with at least k = 2 candidates")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie in [0, 1]; the paper uses 0.3 and 0.4")
    best, win = at_least_float32(scores).max(dim=0)
    worst, lose = at_least_float32(scores).min(dim=0)
    margin = torch.tanh((best - worst) / 2)
    return Selection(win, lose, keep=margin > threshold, margin=margin)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Candidate index[j] of each prompt j: x (k, b, ...), index (b,) int -> (b, ...)."""
    return x[index, torch.arange(len(index), device=index.device)]


def pairs_of(
    latents: Sequence[Tensor], times: Sequence[float], cond: Conditioning, selection: Selection
) -> tuple[Pairs, ...]:
    """The kept pairs of each step of k paths: latents x_t (1, b, c, h, w), then (k, b, c, h, w) after each step.

    times: of the latents; cond: b. In the first step win and lose share x_t, in later ones each has its own.
    """
    return tuple(_pairs(latents[j : j + 2], times[j : j + 2], cond, selection) for j in range(len(latents) - 1))


def _pairs(latents: Sequence[Tensor], times: Sequence[float], cond: Conditioning, selection: Selection) -> Pairs:
    def both(x: Tensor) -> Tensor:  # (k, b, ...) -> (b, 2, ...)
        return torch.stack([take(x, selection.win), take(x, selection.lose)], dim=1)

    x_t, x_prev = latents
    t, t_prev = (torch.full((len(cond),), time, device=x_t.device) for time in times)
    x_t = x_t.transpose(0, 1) if len(x_t) == 1 else both(x_t)
    found = Pairs(x_t=x_t, x_prev=both(x_prev), t=t, t_prev=t_prev, cond=cond, margin=selection.margin)
    return found[selection.keep]


def group_advantage(scores: Tensor, *, limit: float) -> Tensor:
    """(score - mean) / std within each prompt's group, clamped to [-limit, limit]; scores: (k, b), k >= 2.

    A group of equal scores has advantages of 0 (GRPO, arXiv 2402.03300, section 4.1.2).
    """
    centred = scores.float() - scores.float().mean(dim=0)
    return (centred / (centred.std(dim=0) + 1e-4)).clamp(-limit, limit)
