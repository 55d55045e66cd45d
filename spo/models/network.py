"""The network of a diffusion model: it encodes prompts and predicts, with its adapter on or off."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from spo.core.prediction import guide
from spo.core.types import Conditioning
from spo.models.merging import merged_adapter

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline


class Network(ABC):
    """A pipeline's denoising network and its text encoders; a family says how the two fit together.

    All of the pipeline is frozen and in eval mode; what trains is added later, by `lora.add_lora` or `unfreeze`.
    Computation is in the network's dtype (autocast below float32), trainable weights and results are float32.

    Args:
        pipeline: already on its device
        resolution: height and width of an image, in pixels
        batch_size: samples, each half of the guidance counted, that go through at a time without gradients;
            None: 64, and fewer where they would have more than 32 times 64 x 64 positions
    """

    component: ClassVar[str]  # the pipeline's name of the denoising network: unet or transformer
    upcasts_vae: ClassVar[bool] = False  # whether the pipeline runs a float16 VAE in float32 where its config says so

    def __init__(self, pipeline: Pipeline, *, resolution: int, batch_size: int | None = None):
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        self.pipeline = pipeline
        self.module: Any = getattr(pipeline, self.component)
        self.dtype: torch.dtype = self.module.dtype
        self.device: torch.device = self.module.device
        self.resolution = resolution
        size = resolution // pipeline.vae_scale_factor
        self.latent_shape = (self.module.config.in_channels, size, size)
        self.batch_size = batch_size or min(64, max(2, 32 * 64**2 // size**2))
        self.forwards = 0  # samples that went through, each half of the guidance counted
        self._negative: dict[str, Tensor] | None = None
        self._merged = False
        self._frozen: nn.Module | None = None

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

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, *, guidance_scale: float) -> Tensor:
        """The guided output (b, c, h, w), float32, for x_t (b, c, h, w) at times t (b,).

        At a guidance scale of 1 the network sees each sample once, else twice: both halves go through in one call.
        Differentiable; without gradients it goes by slices of `batch_size`.
        """
        if not len(x_t) == len(t) == len(cond):
            raise ValueError(f"predict got {len(x_t)} latents, {len(t)} timesteps and {len(cond)} conditions")
        guided = guidance_scale > 1
        size = len(x_t) if torch.is_grad_enabled() else max(1, self.batch_size // (1 + guided))
        slices = [slice(start, start + size) for start in range(0, len(x_t), size)]
        parts = [self._predict_at_once(x_t[part], t[part], cond[part], guidance_scale) for part in slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _predict_at_once(self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        guided = guidance_scale > 1
        if guided:
            x_t, t = x_t.repeat(2, 1, 1, 1), t.repeat(2)
        self.forwards += len(x_t)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.module(x_t.to(self.dtype), t, **self._inputs(cond, guided)).sample
        output = output.float()
        if not guided:
            return output
        negative, positive = output.chunk(2)
        return guide(negative, positive, guidance_scale)

    @abstractmethod
    def _inputs(self, cond: Conditioning, guided: bool) -> dict[str, Any]:
        """The network's keyword arguments; if guided, the negative half first."""

    @staticmethod
    def _halves(cond: Conditioning, name: str, guided: bool) -> Tensor:
        """The named tensor, after its negative if guided: (b, ...) or (2 * b, ...)."""
        positive = cond.tensors[name]
        return torch.cat([cond.tensors[f"negative_{name}"], positive]) if guided else positive

    def parameters(self) -> list[nn.Parameter]:
        """What trains: the LoRA's weights, or after `unfreeze` all. Not to be called within `reference()`."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def unfreeze(self) -> None:
        """Full fine-tuning: the whole network trains, in float32, and a frozen copy of it is the reference."""
        self._frozen = copy.deepcopy(self.module)
        self.module.float().requires_grad_(True)

    def replace(self, module: nn.Module) -> None:
        """Make `module` the policy; the network of before, frozen, is the reference."""
        self.restore()
        self._frozen = self.module
        self._use(module.eval().requires_grad_(False))

    def restore(self) -> None:
        """Undo `replace` and `unfreeze`: the base is the policy again."""
        if self._frozen is not None:
            self._use(self._frozen)
            self._frozen = None

    def _use(self, module: nn.Module) -> None:
        self.module = module
        setattr(self.pipeline, self.component, module)

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA is attached, on or off."""
        return bool(getattr(self.module, "peft_config", None))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, `predict` and the pipeline are the reference model: the adapter is off, or the frozen copy is on.

        Gradients of what was computed before are unharmed. RuntimeError while the adapter is merged.
        """
        if self._frozen is not None:
            policy = self.module
            self._use(self._frozen)
            try:
                yield
            finally:
                self._use(policy)
        elif self._merged:
            raise RuntimeError("the adapter is merged into the weights; leave `merged()` before using the reference")
        elif self.has_adapter:
            self.module.disable_adapters()
            try:
                yield
            finally:
                self.module.enable_adapters()
        else:
            yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within it, `predict` is the policy without the cost of its adapter, and is not to be trained.

        The adapter is added into the weights, which come back to the bit. Only in float32: half precision would round
        most of a small update away, so there nothing is merged.
        """
        if not self.has_adapter or self.dtype != torch.float32:
            yield
            return
        with merged_adapter(self.module):
            self._merged = True
            try:
                yield
            finally:
                self._merged = False
