"""The diffusers schedulers for a sampler."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import schedulers
from diffusers.schedulers import KarrasDiffusionSchedulers

from spo.config import SamplerConfig
from spo.errors import ConfigError, one_line

UNUSABLE = {
    "DPMSolverSDEScheduler",  # its noise does not come from an image's own seed
    "EDMEulerScheduler",  # for models that were trained with it
}
USABLE = sorted(
    {*KarrasDiffusionSchedulers.__members__, "LCMScheduler", "SASolverScheduler", "TCDScheduler"} - UNUSABLE
)


def build_scheduler(sampler: SamplerConfig, base: Mapping[str, Any] | None = None) -> Any:
    """The sampler's scheduler, with the noise schedule of the scheduler configuration `base`, or the class's default.

    ConfigError if the settings are wrong.
    """
    name = sampler.scheduler
    if name not in USABLE:
        raise ConfigError(f"scheduler={name!r} is no scheduler that the pipeline can use; use one of {USABLE}")
    kind = getattr(schedulers, name)
    known = [option for option in inspect.signature(kind.__init__).parameters if option != "self"]
    if unknown := [option for option in sampler.options if option not in known]:
        raise ConfigError(f"options={unknown} are unknown to {name}; use some of {known}")
    if sampler.eta is not None and "eta" not in inspect.signature(kind.step).parameters:
        raise ConfigError(f"eta={sampler.eta:g}, but {name} has no eta; leave eta out")
    try:
        scheduler = kind.from_config(dict(base or {}), **sampler.options)
        scheduler.set_timesteps(sampler.steps)
    except Exception as error:  # each class checks its settings in its own way
        raise ConfigError(
            f"{sampler.description}: {name} refuses: {one_line(error, 200)}; change the settings"
        ) from None
    return scheduler
