"""SPO's rollout: k paths from one noisy latent, scored at their ends (SPO, arXiv 2406.04314, algorithm 1).

A prompt is first denoised for `first_step` steps. From then on each segment of `branch_steps` steps draws k paths from
ONE x_t and scores their ends; sampling continues from one path, by default drawn without regard to the scores. A
segment of 1 step is the paper's algorithm and SD 1.5's setting; 4 is SDXL's.

A preference model that reads the predicted x_0 costs one forward of the policy for each of the k ends. The same forward
is the next step of the path that sampling continues from, so no latent passes through the policy twice. A preference
model that scores the latents costs only the forward of that path.

An early predicted x_0 is a blur and says little about the image that a candidate becomes. With `look_ahead` n each end
is denoised further by n steps without noise, evenly over what is left of the grid, and the x_0 predicted there is
scored. This is ours, not the paper's; it costs up to n more forwards for each end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from spo.core.gaussian import sample
from spo.core.selection import take
from spo.core.types import Candidates, Conditioning, Denoiser, Noise, Scorer, Transition

ContinueFrom = Literal["random", "win", "lose"]


@dataclass(frozen=True)
class Segment:
    """k paths of `branch_steps` steps from one x_t, and the scores of their ends."""

    latents: tuple[Tensor, ...]  # x_t (1, b, c, h, w), then (k, b, c, h, w) after each step that has a density
    times: tuple[float, ...]  # of those latents, descending
    cond: Conditioning  # b
    scores: Tensor  # (k, b)
    transitions: tuple[Transition, ...]  # of those steps: the Gaussians (1, b, ...), then (k, b, ...)
    unet_forwards: int  # samples predicted since the previous segment


@torch.no_grad()
def rollout(
    policy: Denoiser,
    scorer: Scorer,
    cond: Conditioning,
    text: Any,
    *,
    candidates: int,
    first_step: int,
    branch_steps: int,
    noise: Noise,
    continue_from: ContinueFrom = "random",
    look_ahead: int = 0,
) -> Iterator[Segment]:
    """Sample the prompts of cond once and yield a Segment every `branch_steps` steps from `first_step` on.

    cond, text: the b prompts for the policy and the scorer; noise: of these prompts; candidates: k >= 2;
    first_step, branch_steps: counts of grid steps. The candidates of the last step are scored as they are, at t = 0.
    A last step without density (a flow's) is taken but is not in the segment, and no segment starts with it.
    continue_from "win" or "lose" (the best or worst candidate) are the paper's ablations.
    look_ahead: further steps without noise before x_0 is predicted and scored; fewer where fewer are left.
    Do not train the policy before the last segment, because later steps use earlier predictions. Raises ValueError at
    the first segment if the counts do not fit the policy's grid.
    """
    num_steps, k = len(policy.timesteps), candidates
    num_trainable = policy.num_trainable
    _check(num_steps, num_trainable, k, first_step, branch_steps, continue_from)
    step = _Step(policy, cond, noise)

    x_t = step.noise(-1, 1)  # (1, b, c, h, w)
    for i in range(first_step):
        x_t = sample(step.transition(x_t, i), step.noise(i, 1))
    transition = step.transition(x_t, first_step)

    for i in range(first_step, num_trainable, branch_steps):
        end = i + branch_steps
        path, transitions = [x_t, sample(transition, step.noise(i, k))], [transition]
        for j in range(i + 1, end):
            transitions.append(step.transition(path[-1], j))
            path.append(sample(transitions[-1], step.noise(j, k)))
        ends = _Ends(step, path[-1], end, look_ahead)
        scores = scorer(
            Candidates(
                ends.x,
                step.grid[ends.stops[-1]],
                text,
                predict_x_0=ends.predict_x_0,
                decode=policy.decode,
                t_from=step.grid[end - 1],
            )
        )
        count = min(end, num_trainable) - i
        yield Segment(
            tuple(path[: count + 1]),
            tuple(step.grid[i : i + count + 1]),
            cond,
            scores,
            tuple(transitions[:count]),
            step.pop_forwards(),
        )
        if end < num_trainable:
            match continue_from:
                case "random":
                    index = noise.choice(i, k)
                case "win":
                    index = scores.argmax(dim=0)
                case "lose":
                    index = scores.argmin(dim=0)
            x_t, transition = ends.continue_from(index)


class _Step:
    """The policy on paths (k, b, c, h, w), by grid index; counts the samples it predicts."""

    def __init__(self, policy: Denoiser, cond: Conditioning, noise: Noise):
        self.policy = policy
        self.grid = [*policy.timesteps.tolist(), 0]  # t_0 .. t_{T-1}, then 0, where sampling ends
        self.conds = {1: cond}
        self._noise = noise
        self._forwards = 0

    def noise(self, i: int, k: int) -> Tensor:
        """(k, b, c, h, w) for grid step i."""
        return self._noise.normal(i, (k, *self.policy.latent_shape)).transpose(0, 1)

    def transition(self, x_t: Tensor, i: int) -> Transition:
        """p(x_prev | x_t) at grid step i, with fields (k, b, ...)."""
        return self.between(self.predict(x_t, i), x_t, i, i + 1)

    def predict(self, x_t: Tensor, i: int) -> Tensor:
        """The policy's output (k * b, c, h, w) for x_t (k, b, c, h, w) at grid step i."""
        k, b = x_t.shape[:2]
        if k not in self.conds:
            self.conds[k] = self.conds[1].repeat(k)
        self._forwards += k * b
        return self.policy.predict(x_t.flatten(0, 1), self._times(i, x_t), self.conds[k])

    def between(self, output: Tensor, x_t: Tensor, i: int, j: int, *, eta: float | None = None) -> Transition:
        """p(x | x_t) from grid step i to j, with fields (k, b, ...); eta None: the sampler's."""
        times = (self._times(index, x_t) for index in (i, j))
        transition = self.policy.transition(output, x_t.flatten(0, 1), *times, eta=eta)
        return transition.map(lambda tensor: tensor.unflatten(0, x_t.shape[:2]))

    def _times(self, i: int, x_t: Tensor) -> Tensor:
        return torch.full((x_t.shape[0] * x_t.shape[1],), self.grid[i], device=x_t.device)

    def pop_forwards(self) -> int:
        forwards, self._forwards = self._forwards, 0
        return forwards


class _Ends:
    """The ends (k, b, c, h, w) of a segment's paths at grid step i; predicts their x_0 only when it is read.

    stops: i, and the grid steps of the look-ahead; x_0 is predicted at the last one.
    """

    def __init__(self, step: _Step, x: Tensor, i: int, look_ahead: int):
        self.x = x
        self._step = step
        self._i = i
        self._transition: Transition | None = None
        left = len(step.policy.timesteps) - i
        further = max(0, min(look_ahead, left - 1))
        self.stops = [i + round(left * n / (further + 1)) for n in range(further + 1)]

    def predict_x_0(self) -> Tensor:
        """(k, b, c, h, w); at the end of sampling the latents are already clean."""
        if self._i == len(self._step.policy.timesteps):
            return self.x
        x, output = self.x, self._step.predict(self.x, self._i)
        now = self._transition = self._step.between(output, x, self._i, self._i + 1)
        for i, j in pairwise(self.stops):
            x = self._step.between(output, x, i, j, eta=0.0).mean
            output = self._step.predict(x, j)
            now = self._step.between(output, x, j, j + 1)
        return now.x_0

    def continue_from(self, index: Tensor) -> tuple[Tensor, Transition]:
        """x_t and its transition, (1, b, ...) each, of candidate index[j] of each prompt j."""

        def chosen(x: Tensor) -> Tensor:  # (k, b, ...) -> (1, b, ...)
            return take(x, index).unsqueeze(0)

        x_t = chosen(self.x)
        return x_t, self._transition.map(chosen) if self._transition else self._step.transition(x_t, self._i)


def _check(
    num_steps: int, num_trainable: int, candidates: int, first_step: int, branch_steps: int, continue_from: str
) -> None:
    """ValueError if the arguments do not fit a grid of `num_steps`, of which the first ones have a density."""
    if continue_from not in ("random", "win", "lose"):
        raise ValueError(f"continue_from={continue_from!r} is unknown; use random, win or lose")
    if candidates < 2:
        raise ValueError(f"candidates={candidates} make no pair; use 2 or more")
    if not 0 <= first_step < num_trainable:
        raise ValueError(f"first_step={first_step} must lie in [0, {num_trainable}), the steps with a density")
    branched = num_steps - first_step
    if branch_steps < 1 or branched % branch_steps:
        allowed = [n for n in range(1, branched + 1) if branched % n == 0]
        raise ValueError(
            f"branch_steps={branch_steps} must divide steps - first_step = {branched}; use one of {allowed}"
        )
