"""The sampler of training: a schedule, a grid of timesteps, and the Gaussian step between two timesteps."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from spo.config import SamplingConfig
from spo.core.prediction import PredictionType, predict_x_0_and_noise, training_target
from spo.core.schedule import Cps, FlowSde, RectifiedFlow, Schedule, VariancePreserving
from spo.core.step import gaussian_step
from spo.core.types import Transition

FLOWS = {"ddim": RectifiedFlow, "flow-sde": FlowSde, "cps": Cps}  # by `sampling.noise`


@dataclass(frozen=True)
class Sampler:
    """eta and guidance_scale as in `SamplingConfig`."""

    schedule: Schedule
    timesteps: Tensor  # (T,), descending
    prediction_type: PredictionType
    eta: float
    guidance_scale: float

    @classmethod
    def ddim(cls, scheduler_config: Any, sampling: SamplingConfig, device: torch.device) -> Self:
        """DDIM on the grid of diffusers' DDIMScheduler, so it samples like the pipeline."""
        scheduler = DDIMScheduler.from_config(scheduler_config)
        scheduler.set_timesteps(sampling.steps)
        return cls(
            VariancePreserving(scheduler.alphas_cumprod.to(device, torch.float32)),
            scheduler.timesteps.to(device),
            prediction_type=scheduler.config.prediction_type,
            eta=sampling.eta,
            guidance_scale=sampling.guidance_scale,
        )

    @classmethod
    def flow(cls, scheduler_config: Any, sampling: SamplingConfig, device: torch.device, **grid: Any) -> Self:
        """Rectified flow on the grid of diffusers' FlowMatchEulerDiscreteScheduler; eta 0 is its Euler step.

        grid: what else the pipeline gives to `set_timesteps`: sigmas, mu.
        """
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
        scheduler.set_timesteps(sampling.steps, **grid)
        return cls(
            FLOWS[sampling.noise](scheduler.config.num_train_timesteps),
            scheduler.timesteps.to(device),
            prediction_type="flow",
            eta=sampling.eta,
            guidance_scale=sampling.guidance_scale,
        )

    @property
    def num_trainable(self) -> int:
        """Steps with a density; at time 0 a flow has no noise, so its last step has none."""
        end = self.schedule.level(self.timesteps.new_zeros(1))
        return len(self.timesteps) - int(end.noise == 0)

    def transition(
        self, output: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor, *, eta: float | None = None
    ) -> Transition:
        """The step from t to t_prev, both (b,), in float32; with the sampler's own eta if None."""
        return gaussian_step(
            output.float(),
            x_t.float(),
            t,
            t_prev,
            schedule=self.schedule,
            eta=self.eta if eta is None else eta,
            prediction_type=self.prediction_type,
        )

    def predict_x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latents (b, c, h, w) predicted by an output for x_t (b, c, h, w) at times t (b,)."""
        level = self.schedule.level(t)
        return predict_x_0_and_noise(output, x_t.float(), level, prediction_type=self.prediction_type)[0]

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = signal x_0 + noise eps; all (b, c, h, w), t (b,)."""
        level = self.schedule.level(t)
        return level.signal * x_0 + level.noise * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The correct output (b, c, h, w) of the network for `add_noise(x_0, noise, t)`."""
        return training_target(x_0, noise, self.schedule.level(t), prediction_type=self.prediction_type)
