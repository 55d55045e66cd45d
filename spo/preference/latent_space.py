"""Which latents a latent preference model can read: those of one autoencoder's encoder."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.errors import ModelError

SIDE = 64  # pixels of the probe
TOLERANCE = 0.1  # of the latents' norm; bfloat16 differs by about .01, another autoencoder by about 1


@dataclass(frozen=True)
class LatentSpace:
    """An autoencoder's scaling and shift, and its latents of one fixed image, averaged over the image's quarters.

    A hash of the weights would refuse the same autoencoder in another precision, and one with another decoder, whose
    latents are the same.
    """

    scaling_factor: float
    shift_factor: float
    probe: tuple[float, ...]  # 4 numbers a channel

    @classmethod
    def from_json(cls, values: dict[str, Any] | None) -> Self | None:
        """What `asdict` gave, read from JSON."""
        return None if values is None else cls(**{**values, "probe": tuple(values["probe"])})

    @classmethod
    @torch.no_grad()
    def of(cls, vae: Any) -> Self:
        """The latent space of a diffusers AutoencoderKL."""
        latents = vae.encode(_probe_image().to(vae.device, vae.dtype)).latent_dist.mean.float()
        numbers = F.adaptive_avg_pool2d(latents, 2).flatten().tolist()
        probe = tuple(float(f"{number:.5g}") for number in numbers)
        return cls(vae.config.scaling_factor, vae.config.shift_factor or 0.0, probe)

    def check(self, vae: Any, *, model: str = "the preference model") -> None:
        """ModelError where the latents of `vae` are others than those the preference model was trained on."""
        other = type(self).of(vae)
        if len(other.probe) != len(self.probe):
            found = f"it makes {len(other.probe) // 4} channels instead of {len(self.probe) // 4}"
        elif (other.scaling_factor, other.shift_factor) != (self.scaling_factor, self.shift_factor):
            found = (
                f"its scaling and shift are {other.scaling_factor:g} and {other.shift_factor:g} instead of "
                f"{self.scaling_factor:g} and {self.shift_factor:g}"
            )
        else:
            own, others = torch.tensor(self.probe), torch.tensor(other.probe)
            difference = float((others - own).norm() / own.norm().clamp(min=1e-6))
            if difference <= TOLERANCE:
                return
            found = f"its latents of one image differ by {difference:.0%}"
        raise ModelError(
            f"{model} reads the latents of another autoencoder than the policy's: {found}; "
            "use a preference model that was trained on the policy's base, or one that scores images"
        )


def _probe_image() -> Tensor:
    """(1, 3, SIDE, SIDE) in [-1, 1]: a ramp across, a ramp down, and waves."""
    ramp = torch.linspace(-1, 1, SIDE)
    across, down = ramp.expand(SIDE, SIDE), ramp[:, None].expand(SIDE, SIDE)
    return torch.stack([across, down, torch.sin(9 * across * down)]).unsqueeze(0)
