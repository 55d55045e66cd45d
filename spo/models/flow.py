"""What the families of rectified flow share: a transformer, and a grid that depends on the resolution."""

from abc import abstractmethod
from typing import Any, ClassVar

from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from spo.config import SamplingConfig
from spo.models.network import Network
from spo.models.sampler import Sampler


class FlowNetwork(Network):
    """A transformer over patches of the latents; it predicts the velocity eps - x_0 at times t = 1000 sigma."""

    component: ClassVar[str] = "transformer"
    patch_size: ClassVar[int] = 2

    def sampler(self, sampling: SamplingConfig) -> Sampler:
        return Sampler.flow(self.pipeline.scheduler.config, sampling, self.device, **self.grid(sampling.steps))

    @abstractmethod
    def grid(self, steps: int) -> dict[str, Any]:
        """What the pipeline gives to `set_timesteps` beside the number of steps."""

    @property
    def mu(self) -> float:
        """The shift of a dynamic grid: it grows with the number of patches; ignored by other schedulers."""
        config, (_, height, width) = self.pipeline.scheduler.config, self.latent_shape
        return calculate_shift(
            height * width // self.patch_size**2,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
