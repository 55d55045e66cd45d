"""The diffusers schedulers of a model and of a sampler; flow models have one, which can add noise."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, schedulers
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from spo.config import FLOW, ModelConfig, SamplerConfig
from spo.core.schedule import Level, marginal_preserving_split
from spo.errors import ConfigError, ModelError, one_line

UNUSABLE = {
    "DPMSolverSDEScheduler",  # its noise does not come from an image's own seed
    "EDMEulerScheduler",  # for models that were trained with it
}
USABLE = sorted(
    {*KarrasDiffusionSchedulers.__members__, "LCMScheduler", "SASolverScheduler", "TCDScheduler"} - UNUSABLE
)


class FlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's step with the noise of `RectifiedFlow`; eta 0 is diffusers' own.

    Latents may be packed. eta and the images' generators are attributes, since flow pipelines pass neither.
    """

    eta = 0.0
    generators: list[Generator] | None = None

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, then = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        (euler,) = super().step(model_output, timestep, sample, return_dict=False)
        if self.eta == 0:
            return (euler,)
        kept, std = marginal_preserving_split(Level(1 - sigma, sigma), Level(1 - then, then), eta=self.eta)
        eps = sample.float() + (1 - sigma) * model_output.float()
        fresh = randn_tensor(sample.shape, generator=self.generators, device=sample.device, dtype=torch.float32)
        return ((euler.float() + (kept - then) * eps + std * fresh).to(euler.dtype),)


def plain_scheduler(scheduler: Any, config: ModelConfig) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """DDIM or Euler with the noise of a model's own scheduler, without clipping.

    ModelError if that belongs to another kind of model, which DDIM would take for one with default betas.
    """
    name, settings = type(scheduler).__name__, scheduler.config
    prediction = settings.get("prediction_type", "epsilon")
    is_flow = "FlowMatch" in name or settings.get("use_flow_sigmas") or prediction == "flow_prediction"
    where = f"model.path={config.path!r}: its scheduler, {name} with prediction_type {prediction},"
    if is_flow != config.is_flow or not (is_flow or "beta_schedule" in settings):
        fitting = "sd3 or flux" if is_flow else "sd15 or sdxl" if "beta_schedule" in settings else "none of ours"
        raise ModelError(f"{where} is not for family {config.family}; the family that fits is {fitting}")
    if is_flow:
        return FlowMatchEulerDiscreteScheduler.from_config(settings, stochastic_sampling=False)
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{where} is unknown; prediction_type must be epsilon, v_prediction or sample")
    plain = DDIMScheduler.from_config(settings, clip_sample=False, thresholding=False)
    if prediction == "epsilon" and plain.alphas_cumprod.min() <= 0:
        raise ModelError(
            f"{where} has a last timestep without any signal, from which epsilon tells no image; set "
            '"rescale_betas_zero_snr": false in its scheduler/scheduler_config.json, or use a v_prediction model'
        )
    return plain


def build_scheduler(sampler: SamplerConfig, base: Mapping[str, Any] | None = None) -> Any:
    """The sampler's scheduler, with the noise schedule of the scheduler configuration `base`, or the class's default.

    ConfigError if the settings are wrong.
    """
    name = sampler.scheduler
    if name == FLOW:
        return _build_flow(sampler, base)
    if name not in USABLE:
        raise ConfigError(f"scheduler={name!r} is no scheduler that the pipeline can use; use one of {USABLE}")
    kind = getattr(schedulers, name)
    if sampler.eta is not None and "eta" not in inspect.signature(kind.step).parameters:
        raise ConfigError(f"eta={sampler.eta:g}, but {name} has no eta; leave eta out")
    return _built(kind, sampler, base)


def _build_flow(sampler: SamplerConfig, base: Mapping[str, Any] | None) -> FlowScheduler:
    """With a dynamic grid, set_timesteps needs a mu; the pipeline sets the timesteps again with its own."""
    scheduler = _built(FlowScheduler, sampler, base, mu=1.0)
    scheduler.eta = sampler.eta or 0.0
    return scheduler


def _built(kind: Any, sampler: SamplerConfig, base: Mapping[str, Any] | None, **grid: float) -> Any:
    known = [option for option in inspect.signature(kind.__init__).parameters if option != "self"]
    if unknown := [option for option in sampler.options if option not in known]:
        raise ConfigError(f"options={unknown} are unknown to {sampler.scheduler}; use some of {known}")
    try:
        scheduler = kind.from_config(dict(base or {}), **sampler.options)
        total = scheduler.config.num_train_timesteps
        if sampler.steps > total and sampler.scheduler != FLOW:
            raise ConfigError(f"{sampler.steps} steps are more than the {total} timesteps of training")
        scheduler.set_timesteps(sampler.steps, **grid)
    except Exception as error:  # each class checks its settings in its own way
        raise ConfigError(
            f"{sampler.description}: {sampler.scheduler} refuses: {one_line(error, 200)}; change the settings"
        ) from None
    return scheduler
