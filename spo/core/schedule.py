"""The shares of signal and noise in a latent at a time: x_t = signal x_0 + noise eps.

A schedule also splits the noise of x_prev: one part is kept from the predicted eps, the rest is fresh. Times are
training timesteps, integers or floats in [0, 1000].
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """x_t = signal x_0 + noise eps."""

    signal: Tensor  # (b, 1, 1, 1)
    noise: Tensor  # (b, 1, 1, 1)


class Schedule(Protocol):
    @property
    def num_timesteps(self) -> int:
        """Training timesteps; times lie in [0, num_timesteps]."""
        ...

    def level(self, t: Tensor) -> Level:
        """Signal and noise at times t (b,)."""
        ...

    def split_noise(self, t: Tensor, t_prev: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
        """The factors of the predicted eps and of fresh noise: (kept, std), each (b, 1, 1, 1), eta in [0, 1].

        kept^2 + std^2 = noise'^2, the noise level at t_prev, except for `FlowSde`.
        """
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """DDPM's schedule: signal = sqrt(alpha_bar), noise = sqrt(1 - alpha_bar) (arXiv 2006.11239, eq. 4).

    alpha_bar: (N,) for the training timesteps 0 .. N - 1, at least float32. A time below 0 counts as 0, as in the
    published SPO code. Between two timesteps log(alpha_bar) is linear.
    """

    alpha_bar: Tensor

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_bar)

    def level(self, t: Tensor) -> Level:
        alpha_bar = self._at(t)
        return Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def split_noise(self, t: Tensor, t_prev: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
        """DDIM's std (arXiv 2010.02502, eq. 16), which equals `marginal_preserving_split` of the levels.

        The operations are in the order of the published code, because the last factor cancels in float32: at t = 1 its
        rounding error is 1e-4 of its value.
        """
        now, then = self._at(t), self._at(t_prev)
        std = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        return (1 - then - std**2).sqrt(), std

    def _at(self, t: Tensor) -> Tensor:
        """alpha_bar (b, 1, 1, 1) at times t (b,)."""
        if not t.is_floating_point():
            return self.alpha_bar[t.clamp(min=0)].view(-1, 1, 1, 1)
        t = t.clamp(0, self.num_timesteps - 1)
        below = t.floor().long()
        above = (below + 1).clamp(max=self.num_timesteps - 1)
        between = self.alpha_bar[below].log().lerp(self.alpha_bar[above].log(), (t - below).to(self.alpha_bar.dtype))
        return torch.where(t == below, self.alpha_bar[below], between.exp()).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class RectifiedFlow:
    """Rectified flow: signal = 1 - sigma, noise = sigma, sigma = t / num_timesteps (arXiv 2209.03003)."""

    num_timesteps: int = 1000

    def level(self, t: Tensor) -> Level:
        sigma = (t / self.num_timesteps).view(-1, 1, 1, 1)
        return Level(1 - sigma, sigma)

    def split_noise(self, t: Tensor, t_prev: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
        return marginal_preserving_split(self.level(t), self.level(t_prev), eta=eta)


@dataclass(frozen=True)
class FlowSde(RectifiedFlow):
    """Flow-GRPO's step (arXiv 2505.05470; yifan123/flow_grpo, noise level .7): `eta` is its noise level a.

    s^2 = a^2 sigma / (1 - sigma), std = s sqrt(delta), kept = sigma' - s^2 delta / (2 sigma), delta = sigma - sigma'.
    At sigma = 1 its code divides by 1 - sigma'. The marginals are kept only for small steps: kept^2 + std^2 > sigma'^2.
    """

    def split_noise(self, t: Tensor, t_prev: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
        sigma, then = self.level(t).noise, self.level(t_prev).noise
        delta = sigma - then
        variance = eta**2 * sigma / (1 - torch.where(sigma == 1, then, sigma))  # s^2
        return then - variance * delta / (2 * sigma), (variance * delta).sqrt()


@dataclass(frozen=True)
class Cps(RectifiedFlow):
    """CPS (arXiv 2509.05952; .8 in X-GenGroup/Flow-Factory): std = sigma' sin(eta pi / 2), whatever the step's size."""

    def split_noise(self, t: Tensor, t_prev: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
        then = self.level(t_prev).noise
        return then * math.cos(eta * math.pi / 2), then * math.sin(eta * math.pi / 2)


def marginal_preserving_split(now: Level, then: Level, *, eta: float) -> tuple[Tensor, Tensor]:
    """(kept, std) of a step from the level `now` to the level `then`.

    With r = (signal / noise) / (signal' / noise') in [0, 1]: std = eta noise' sqrt(1 - r^2) and
    kept = noise' sqrt(1 - eta^2 (1 - r^2)). eta 0 is deterministic (for rectified flow Euler's step), eta 1 is DDPM's
    posterior. At signal 0 all noise is fresh; at noise' 0 std is 0, so there is no density.
    """
    r = now.signal * then.noise / (then.signal * now.noise)
    fresh = (1 - r**2).clamp(min=0)
    return then.noise * (1 - eta**2 * fresh).sqrt(), eta * then.noise * fresh.sqrt()
