"""SPO's rollout: step-wise pairs from a policy's own samples (SPO, arXiv 2406.04314, algorithm 1).

A prompt is denoised plainly for `first_step` steps. From then on each segment of `branch_steps` steps draws k
paths from ONE x_t, scores their ends, and yields the best and the worst as pairs; sampling goes on from a path
drawn without regard to the scores. A segment of 1 step is the paper's algorithm and SD 1.5's setting; 4 is SDXL's.

A path's end is judged by the x_0 that the policy predicts from it at its own timestep; the pass that predicts
it also serves as the next step of the path that goes on, so no latent passes through the policy twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spo.core.gaussian import sample
from spo.core.selection import select_pairs, take
from spo.core.types import Conditioning, Denoiser, Noise, Pairs, Scorer, Selection, Transition

ContinueFrom = Literal["random", "win", "lose"]
Pairing = Literal["best_worst", "random"]


@dataclass(frozen=True)
class Segment:
    """The kept pairs of one segment, and what happened in it."""

    pairs: tuple[Pairs, ...]  # one a step, each of num_kept pairs; in the first, win and lose share x_t
    t: int  # where the paths part
    num_branched: int  # b, the prompts
    num_kept: int
    score: float  # mean over (k, b)
    margin: float  # mean over b, kept or not
    unet_forwards: int  # predicted samples; the first segment's count holds the plain steps before it


@torch.no_grad()
def rollout(
    policy: Denoiser,
    scorer: Scorer,
    cond: Conditioning,
    text: Tensor,
    *,
    candidates: int,
    first_step: int,
    branch_steps: int,
    threshold: float,
    noise: Noise,
    continue_from: ContinueFrom = "random",
    pairing: Pairing = "best_worst",
) -> Iterator[Segment]:
    """Sample the prompts of cond once, yielding a Segment each `branch_steps` steps from `first_step` on.

    cond, text (b, d): the prompts for the policy and the scorer; noise: of these b prompts; candidates: k >= 2;
    first_step, branch_steps: counts of grid steps. The last step's candidates are themselves judged, at t = 0.
    continue_from "win" or "lose" and pairing "random" are the paper's ablations; the latter pairs the first two
    candidates, which are as good as any two, being independent draws from one Gaussian.
    The policy must not be trained before the last segment: it would go on from predictions that are no longer its own.
    Raises ValueError at the first segment where the counts do not fit the policy's grid.
    """
    num_steps, k = len(policy.timesteps), candidates
    _check(num_steps, candidates, first_step, branch_steps, continue_from, pairing)
    step = _Step(policy, cond, noise)
    text_k = text.repeat(k, 1)  # (k * b, d)

    x_t = step.noise(-1, 1)  # (1, b, c, h, w)
    for i in range(first_step):
        x_t = sample(step.transition(x_t, i), step.noise(i, 1))
    transition = step.transition(x_t, first_step)

    for i in range(first_step, num_steps, branch_steps):
        end = i + branch_steps
        path = [x_t, sample(transition, step.noise(i, k))]  # (1, b, c, h, w), then (k, b, c, h, w) each
        for j in range(i + 1, end):
            path.append(sample(step.transition(path[-1], j), step.noise(j, k)))
        ahead = step.transition(path[-1], end) if end < num_steps else None
        x_0 = path[-1] if ahead is None else ahead.x_0

        t_end = torch.tensor(step.grid[end])  # on the CPU: to look it up there waits for no GPU
        scores = scorer(policy.decode(x_0.flatten(0, 1)), text_k, t_end).unflatten(0, (k, -1))  # (k, b)
        selection = select_pairs(scores if pairing == "best_worst" else scores[:2], threshold=threshold)
        kept, score, margin = torch.stack([selection.keep.sum(), scores.mean(), selection.margin.mean()]).tolist()
        yield Segment(
            pairs=tuple(
                _pairs(path[j : j + 2], step.grid[i + j : i + j + 2], cond, selection) for j in range(branch_steps)
            ),
            t=step.grid[i],
            num_branched=len(cond),
            num_kept=int(kept),
            score=score,
            margin=margin,
            unet_forwards=step.pop_forwards(),
        )
        if ahead is not None:
            goes_on = {"random": noise.choice(i, k), "win": selection.win, "lose": selection.lose}[continue_from]
            x_t, transition = _only(path[-1], goes_on), _only_transition(ahead, goes_on)


class _Step:
    """The policy over paths (k, b, c, h, w), by grid index; counts the samples it predicts."""

    def __init__(self, policy: Denoiser, cond: Conditioning, noise: Noise):
        self.policy = policy
        self.grid = [*policy.timesteps.tolist(), 0]  # t_0 .. t_{T-1}, and the 0 at which sampling ends
        self.conds = {1: cond}
        self._noise = noise
        self._forwards = 0

    def noise(self, i: int, k: int) -> Tensor:
        """(k, b, c, h, w) for grid step i."""
        return self._noise.normal(i, (k, *self.policy.latent_shape)).transpose(0, 1)

    def transition(self, x_t: Tensor, i: int) -> Transition:
        """p(x_prev | x_t) at grid step i, its fields (k, b, ...) as x_t is."""
        k, b = x_t.shape[:2]
        if k not in self.conds:
            self.conds[k] = self.conds[1].repeat(k)
        flat = x_t.flatten(0, 1)
        t, t_prev = (torch.full((k * b,), self.grid[j], device=x_t.device) for j in (i, i + 1))
        self._forwards += k * b
        flat_transition = self.policy.transition(self.policy.predict(flat, t, self.conds[k]), flat, t, t_prev)
        mean, std, x_0 = flat_transition.mean, flat_transition.std, flat_transition.x_0
        return Transition(mean.unflatten(0, (k, b)), std.unflatten(0, (k, b)), x_0.unflatten(0, (k, b)))

    def pop_forwards(self) -> int:
        forwards, self._forwards = self._forwards, 0
        return forwards


def _pairs(latents: list[Tensor], timesteps: list[int], cond: Conditioning, selection: Selection) -> Pairs:
    """The kept pairs of one step: latents x_t (1 or k, b, c, h, w), x_prev (k, b, c, h, w); timesteps t, t_prev."""

    def both(x: Tensor) -> Tensor:  # (k, b, ...) -> (b, 2, ...)
        return torch.stack([take(x, selection.win), take(x, selection.lose)], dim=1)

    x_t, x_prev = latents
    t, t_prev = (torch.full((len(cond),), t, device=x_t.device) for t in timesteps)
    x_t = x_t.transpose(0, 1) if len(x_t) == 1 else both(x_t)
    return Pairs(x_t, both(x_prev), t, t_prev, cond, selection.margin)[selection.keep]


def _only(x: Tensor, index: Tensor) -> Tensor:
    """One candidate each, as a path of width 1: (k, b, ...) -> (1, b, ...)."""
    return take(x, index).unsqueeze(0)


def _only_transition(transition: Transition, index: Tensor) -> Transition:
    return Transition(_only(transition.mean, index), _only(transition.std, index), _only(transition.x_0, index))


def _check(
    num_steps: int, candidates: int, first_step: int, branch_steps: int, continue_from: str, pairing: str
) -> None:
    if candidates < 2:
        raise ValueError(f"candidates={candidates} make no pair; use 2 or more")
    if not 0 <= first_step < num_steps:
        raise ValueError(f"first_step={first_step} must lie in [0, {num_steps}), the policy's grid")
    branched = num_steps - first_step
    if branch_steps < 1 or branched % branch_steps:
        allowed = [n for n in range(1, branched + 1) if branched % n == 0]
        raise ValueError(
            f"branch_steps={branch_steps} must divide steps - first_step = {branched}; use one of {allowed}"
        )
    if continue_from not in ("random", "win", "lose"):
        raise ValueError(f"continue_from={continue_from!r} is unknown; use random, win or lose")
    if pairing not in ("best_worst", "random"):
        raise ValueError(f"pairing={pairing!r} is unknown; use best_worst or random")
