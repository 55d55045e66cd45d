"""What the adapters of Stable Diffusion v1.5 and SDXL share: everything but the text conditioning."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeAlias

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Generator, Tensor, nn

from spo.core.ddim import ddim_transition, predictions
from spo.core.guidance import guide
from spo.core.types import Conditioning, Transition
from spo.errors import ModelError
from spo.models.merging import merged_adapter

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline


class LatentDiffusion(ABC):
    """A diffusers pipeline as the core's `Denoiser`.

    The pipeline's networks are frozen and put in eval mode; what trains is added later, by `lora.add_lora` or
    `unfreeze`. Computation is in the pipeline's dtype (autocast below float32), trainable weights and results are
    float32. The timesteps are those of the pipeline's scheduler, so DDIM over them is the pipeline's own sampling.

    Args:
        pipeline: already on its device; only the configuration of its scheduler is used
        resolution: height and width of an image, in pixels
        steps, eta, guidance_scale: the sampler; at guidance 1 the UNet sees each sample once, else twice
        unet_batch_size: samples, each half of the guidance counted, that the UNet takes at a time without gradients;
            None: 64, and fewer where they would have more than 32 times 64 x 64 positions
        vae_batch_size: images that the VAE takes at a time; None: 16, and fewer where they would have more than 8 times
            512 x 512 pixels, or on a CPU 128 x 128
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        resolution: int,
        steps: int = 20,
        eta: float = 1.0,
        guidance_scale: float = 5.0,
        unet_batch_size: int | None = None,
        vae_batch_size: int | None = None,
    ):
        if resolution % pipeline.vae_scale_factor:
            raise ModelError(f"model.resolution={resolution} must be a multiple of {pipeline.vae_scale_factor}")
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        self.pipeline = pipeline
        self.unet = pipeline.unet
        self.vae = pipeline.vae
        self.preview: AutoencoderTiny | None = None  # decodes in the VAE's place
        self.dtype = pipeline.unet.dtype
        self.device = pipeline.unet.device
        pixels = 8 * (128 if self.device.type == "cpu" else 512) ** 2
        self.vae_batch_size = vae_batch_size or min(16, max(1, pixels // resolution**2))
        self.forwards = 0  # samples that went through the UNet, each half of the guidance counted
        self.decodes = 0  # images that `decode` made
        size = resolution // pipeline.vae_scale_factor
        self.latent_shape = (pipeline.unet.config.in_channels, size, size)
        self.unet_batch_size = unet_batch_size or min(64, max(2, 32 * 64**2 // size**2))
        scheduler = pipeline.scheduler.config
        self.prediction_type = scheduler.prediction_type
        self.alpha_bar = DDIMScheduler.from_config(scheduler).alphas_cumprod.to(self.device, torch.float32)
        self._set_sampling(steps, eta, guidance_scale)
        self._negative: dict[str, Tensor] | None = None
        self._merged = False
        self._frozen: UNet2DConditionModel | None = None

    def with_sampling(
        self, *, steps: int | None = None, eta: float | None = None, guidance_scale: float | None = None
    ) -> Self:
        """The same networks behind another sampler; counts its own `forwards` and `decodes`."""
        other = copy.copy(self)
        other.forwards = other.decodes = 0
        other._set_sampling(
            len(self.timesteps) if steps is None else steps,
            self.eta if eta is None else eta,
            self.guidance_scale if guidance_scale is None else guidance_scale,
        )
        return other

    def _set_sampling(self, steps: int, eta: float, guidance_scale: float) -> None:
        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        self.timesteps = scheduler.timesteps.to(self.device)
        self.eta = eta
        self.guidance_scale = guidance_scale

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt: its embeddings, and under `negative_...` those that guidance leads away from."""
        if not prompts:
            raise ValueError("encode needs at least one prompt, got none")
        if self._negative is None:
            self._negative = self._embed_negative()
        negative = {
            f"negative_{name}": tensor.expand(len(prompts), *tensor.shape[1:])
            for name, tensor in self._negative.items()
        }
        return Conditioning({**self._embed(list(prompts)), **negative})

    @abstractmethod
    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """Named embeddings (b, ...) of the prompts."""

    def _embed_negative(self) -> dict[str, Tensor]:
        """The same of the empty prompt (1, ...)."""
        return self._embed([""])

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The guided model output (b, c, h, w), float32, for x_t (b, c, h, w) at timesteps t (b,).

        Both halves of the guidance go through the UNet in one call. Differentiable; without gradients it goes by
        slices of `unet_batch_size`.
        """
        if not len(x_t) == len(t) == len(cond):
            raise ValueError(f"predict got {len(x_t)} latents, {len(t)} timesteps and {len(cond)} conditions")
        guided = self.guidance_scale > 1
        size = len(x_t) if torch.is_grad_enabled() else max(1, self.unet_batch_size // (1 + guided))
        slices = [slice(start, start + size) for start in range(0, len(x_t), size)]
        parts = [self._predict_at_once(x_t[part], t[part], cond[part], guided) for part in slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _predict_at_once(self, x_t: Tensor, t: Tensor, cond: Conditioning, guided: bool) -> Tensor:
        if guided:
            x_t, t = x_t.repeat(2, 1, 1, 1), t.repeat(2)
        self.forwards += len(x_t)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.unet(x_t.to(self.dtype), t, **self._unet_inputs(cond, guided)).sample
        output = output.float()
        if not guided:
            return output
        negative, positive = output.chunk(2)
        return guide(negative, positive, self.guidance_scale)

    @abstractmethod
    def _unet_inputs(self, cond: Conditioning, guided: bool) -> dict[str, Any]:
        """The UNet's keyword arguments; if guided, the negative half first."""

    @staticmethod
    def _halves(cond: Conditioning, name: str, guided: bool) -> Tensor:
        """The named tensor, after its negative if guided: (b, ...) or (2 * b, ...)."""
        positive = cond.tensors[name]
        return torch.cat([cond.tensors[f"negative_{name}"], positive]) if guided else positive

    def predict_x_0(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The latents (b, c, h, w) that the guided model takes x_t (b, c, h, w) at timesteps t (b,) to come from."""
        output = self.predict(x_t, t, cond)
        x_0, _ = predictions(
            output, x_t.float(), self._alpha_bar_at(t).view(-1, 1, 1, 1), prediction_type=self.prediction_type
        )
        return x_0

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise; all (b, c, h, w), t (b,)."""
        alpha_bar = self._alpha_bar_at(t).view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise

    def transition(self, output: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor) -> Transition:
        """DDIM's step from t to t_prev, both (b,); a t_prev below 0 counts as 0, as in the published code."""
        return ddim_transition(
            output.float(),
            x_t.float(),
            self._alpha_bar_at(t),
            self._alpha_bar_at(t_prev),
            eta=self.eta,
            prediction_type=self.prediction_type,
        )

    def _alpha_bar_at(self, t: Tensor) -> Tensor:
        return self.alpha_bar[t.clamp(min=0)]  # (b,)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [0, 1], float32, of latents (b, c, h, w)."""
        vae = self.vae if self.preview is None else self.preview
        latents = (latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(vae.dtype)
        self.decodes += len(latents)
        images = [vae.decode(part).sample for part in latents.split(self.vae_batch_size)]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Latents (b, c, h, w), float32, of images (b, 3, H, W) in [0, 1]: the posterior's mean.

        With a generator (of the model's device) they are drawn from the posterior instead.
        """
        latents = []
        for part in (2 * images - 1).to(self.vae.dtype).split(self.vae_batch_size):
            posterior = self.vae.encode(part).latent_dist
            latents.append(posterior.mean if generator is None else posterior.sample(generator))
        return (torch.cat(latents).float() - self._shift()) * self.vae.config.scaling_factor

    def _shift(self) -> float:
        return self.vae.config.shift_factor or 0.0

    def parameters(self) -> list[nn.Parameter]:
        """What trains: the LoRA's weights, or after `unfreeze` the UNet's. Not to be called within `reference()`."""
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    def unfreeze(self) -> None:
        """Full fine-tuning: all of the UNet trains, in float32, and a frozen copy of it is the reference."""
        self._frozen = copy.deepcopy(self.unet)
        self.unet.float().requires_grad_(True)

    def replace(self, unet: UNet2DConditionModel) -> None:
        """Make `unet` the policy; the UNet of before, frozen, is the reference."""
        self.restore()
        self._frozen = self.unet
        self._use(unet.eval().requires_grad_(False))

    def restore(self) -> None:
        """Undo `replace` and `unfreeze`: the base is the policy again."""
        if self._frozen is not None:
            self._use(self._frozen)
            self._frozen = None

    def _use(self, unet: UNet2DConditionModel) -> None:
        self.unet = self.pipeline.unet = unet

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, `predict` and the pipeline are the reference model: the adapter is off, or the frozen copy is on.

        Gradients of what was computed before are unharmed.
        """
        if self._frozen is not None:
            policy = self.unet
            self._use(self._frozen)
            try:
                yield
            finally:
                self._use(policy)
        elif self._merged:
            raise RuntimeError("the reference cannot be had while the adapter is merged")
        elif has_adapter(self.unet):
            self.unet.disable_adapters()
            try:
                yield
            finally:
                self.unet.enable_adapters()
        else:
            yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within it, `predict` is the policy without the cost of its adapter, and is not to be trained.

        The adapter is added into the weights, which come back to the bit. Only in float32: half precision would round
        most of a small update away, so there nothing is merged.
        """
        if not has_adapter(self.unet) or self.dtype != torch.float32:
            yield
            return
        with merged_adapter(self.unet):
            self._merged = True
            try:
                yield
            finally:
                self._merged = False


def has_adapter(unet: nn.Module) -> bool:
    """Whether a LoRA is attached, on or off."""
    return bool(getattr(unet, "peft_config", None))
