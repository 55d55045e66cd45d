"""The network of a diffusion model: it encodes prompts and predicts, with its adapter on or off."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from spo.config import SamplingConfig, sides
from spo.core.prediction import guide
from spo.core.types import Conditioning
from spo.errors import ModelError
from spo.models.sampler import Sampler
from spo.runtime import distributed
from spo.runtime.sharding import forget_passes, shard

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline | StableDiffusion3Pipeline | FluxPipeline
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # the pipelines' names


def block_kinds(module: Any) -> list[str]:
    """The names of the classes of a network's or a VAE's repeated blocks, and of residual blocks."""
    kinds = module._repeated_blocks or module._no_split_modules  # diffusers has none of the first kind for SD3 and VAEs
    return [*kinds, "ResnetBlock2D"]


def samples_at_once(height: int, width: int) -> int:
    """Latents of this size in one forward without gradients."""
    return min(64, max(2, 32 * 64**2 // (height * width)))


class Network(ABC):
    """A pipeline's denoising network and its text encoders; each model family is a subclass.

    The whole pipeline is frozen and in eval mode; `lora.add_lora` or `unfreeze` adds trainable weights later.
    Computation is in the network's dtype; trainable weights and results are float32. Below float32 a LoRA's layers cast
    their weights themselves (`lora.add_lora`); only full fine-tuning needs autocast, which casts more than weights.

    Args:
        pipeline: already on its device
        resolution: of images, in pixels: the side of a square, or width and height
        t5_tokens: of a prompt; None: as many as the pipeline gives T5
        keep_prompts: encode each prompt once and keep its embeddings in the CPU's memory
        offload_text_encoders: to the CPU's memory while they encode no prompt
    """

    component: ClassVar[str] = "unet"  # the pipeline's name of the denoising network
    upcasts_vae: ClassVar[bool] = False  # whether the pipeline respects the VAE's `force_upcast`
    patch_size: ClassVar[int] = 1  # height and width of latents are multiples of it
    is_distilled: ClassVar[bool] = False  # guidance is an input of the network, not a second pass

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        resolution: int | tuple[int, int],
        t5_tokens: int | None = None,
        keep_prompts: bool = False,
        offload_text_encoders: bool = False,
    ):
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        self.pipeline = pipeline
        self.module: Any = getattr(pipeline, self.component)
        self.dtype: torch.dtype = self.module.dtype
        self.device: torch.device = self.module.device
        self.text_options = {} if t5_tokens is None else {"max_sequence_length": t5_tokens}
        height, width = (side // pipeline.vae_scale_factor for side in sides(resolution))
        self.latent_shape = (self.channels, height, width)
        self.batch_size = samples_at_once(height, width)
        self.forwards: float = 0  # samples so far; both halves of the guidance count
        parts = pipeline.components
        self.offloaded = [parts[name] for name in TEXT_ENCODERS if parts.get(name)] if offload_text_encoders else []
        self._move_text_encoders("cpu")
        self._kept: dict[str, dict[str, Tensor]] | None = {} if keep_prompts else None  # by prompt
        self._negative: dict[str, Tensor] | None = None
        self._merged = False
        self._frozen: nn.Module | None = None
        self.is_sharded = False  # whether each process holds a part of the weights
        self.autocast = False  # whether below float32 the network needs it, because its weights have another dtype

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.module.config.in_channels

    def sampler(self, sampling: SamplingConfig) -> Sampler:
        """The sampler of these settings on the grid of the pipeline."""
        return Sampler.ddim(self.pipeline.scheduler.config, sampling, self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The embeddings of each prompt and, under `negative_...`, those of guidance's negative prompt, if any."""
        if not prompts:
            raise ValueError("encode needs at least one prompt, got none")
        new = list(prompts) if self._kept is None else [p for p in dict.fromkeys(prompts) if p not in self._kept]
        embeds: dict[str, Tensor] = {}
        if new or self._negative is None:
            with self.text_encoders_ready():
                embeds = self._embed(new) if new else {}
                if self._negative is None:
                    self._negative = self._embed_negative()
        if self._kept is not None:
            self._kept |= {p: {name: rows[i].cpu() for name, rows in embeds.items()} for i, p in enumerate(new)}
            kept = [self._kept[prompt] for prompt in prompts]
            embeds = {name: torch.stack([each[name] for each in kept]).to(self.device) for name in kept[0]}
        negative = {
            f"negative_{name}": tensor.expand(len(prompts), *tensor.shape[1:])
            for name, tensor in self._negative.items()
        }
        return Conditioning({**embeds, **negative})

    @contextmanager
    def text_encoders_ready(self) -> Iterator[None]:
        """Inside this context the text encoders are on the network's device."""
        self._move_text_encoders(self.device)
        try:
            yield
        finally:
            self._move_text_encoders("cpu")

    def _move_text_encoders(self, device: torch.device | str) -> None:
        for encoder in self.offloaded:
            encoder.to(device)

    @abstractmethod
    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """Named embeddings (b, ...) of the prompts."""

    def _embed_negative(self) -> dict[str, Tensor]:
        """Named embeddings (1, ...) of the empty prompt."""
        return {} if self.is_distilled else self._embed([""])

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, *, guidance_scale: float) -> Tensor:
        """The guided output (b, c, h, w), float32, for x_t (b, c, h, w) at times t (b,).

        With a guidance scale of 1, or distilled guidance, the network gets each sample once, else twice, both halves in
        one call. Differentiable; without gradients at most `batch_size` samples go through at once. If the network is
        sharded, all processes must call this; those with fewer passes repeat one for the others.
        """
        if not len(x_t) == len(t) == len(cond):
            raise ValueError(f"predict got {len(x_t)} latents, {len(t)} timesteps and {len(cond)} conditions")
        guided = guidance_scale > 1 and not self.is_distilled
        size = len(x_t) if torch.is_grad_enabled() else max(1, self.batch_size // (1 + guided))
        slices = [slice(start, start + size) for start in range(0, len(x_t), size)]
        shared = self.is_sharded and not torch.is_grad_enabled()
        num_passes = distributed.most(len(slices)) if shared else len(slices)
        parts = [self._predict_at_once(x_t[part], t[part], cond[part], guidance_scale, guided) for part in slices]
        forwards = self.forwards
        for _ in range(num_passes - len(slices)):
            self._predict_at_once(x_t[:1], t[:1], cond[:1], guidance_scale, guided)
        self.forwards = forwards
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _predict_at_once(
        self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float, guided: bool
    ) -> Tensor:
        if guided:
            x_t, t = x_t.repeat(2, 1, 1, 1), t.repeat(2)
        self.forwards += len(x_t)
        with self.precision():
            output = self._output(x_t.to(self.dtype), t, self._inputs(x_t, cond, guided), guidance_scale).float()
        if not guided:
            return output
        negative, positive = output.chunk(2)
        return guide(negative, positive, guidance_scale)

    def precision(self) -> torch.autocast:
        """The context in which the network computes: autocast if it needs it, else none."""
        enabled = self.autocast and self.dtype != torch.float32
        # a sharded weight's copy would be kept after the weight is dropped
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=not self.is_sharded)

    def _output(self, x_t: Tensor, t: Tensor, inputs: dict[str, Any], guidance_scale: float) -> Tensor:
        """The network's output (b, c, h, w); guidance_scale is for distilled guidance."""
        return self.module(x_t, timestep=t, **inputs).sample

    @abstractmethod
    def _inputs(self, x_t: Tensor, cond: Conditioning, guided: bool) -> dict[str, Any]:
        """The network's keyword arguments for latents x_t (b, c, h, w); if guided, the negative half first."""

    def _halves(self, cond: Conditioning, name: str, guided: bool) -> Tensor:
        """The named tensor (b, ...) in the network's dtype, or its negative and it (2 * b, ...) if guided."""
        positive = cond.tensors[name]
        return (torch.cat([cond.tensors[f"negative_{name}"], positive]) if guided else positive).to(self.dtype)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable weights: the LoRA's, or all after `unfreeze`. Do not call it inside `reference()`."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def unfreeze(self) -> None:
        """Full fine-tuning: train the whole network in float32; a frozen copy of it is the reference."""
        self._frozen = copy.deepcopy(self.module)
        self.module.float().requires_grad_(True)
        self.autocast = True

    def shard(self) -> None:
        """Leave this process its part of the network's weights and of the frozen copy's; with one process, all.

        Call it in all processes, after `unfreeze` or `lora.add_lora` and before `parameters`.
        """
        if distributed.count() == 1:
            return
        for module in filter(None, (self.module, self._frozen)):
            shard(module, block_kinds(module))
        self.is_sharded = True

    def replace(self, module: nn.Module, *, source: str | Path = "the network") -> None:
        """Make `module` the policy, frozen, and the base the reference; an adapter is dropped.

        ModelError, which names the `source`, if its layers are not the base's.
        """
        self.restore()
        if self.has_adapter:
            self.module.unload_lora()
        shapes = [{name: weight.shape for name, weight in net.state_dict().items()} for net in (module, self.module)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"{source} is the {self.component} of another base model; name its own as `model`")
        layout: dict[str, Any] = {"memory_format": torch.channels_last}  # the base's: see load.order_for_convolutions
        module.to(self.device, self.dtype).to(**layout)
        self._frozen = self.module
        self._use(module.eval().requires_grad_(False))

    def restore(self) -> None:
        """Undo `replace` and `unfreeze`, so the base is the policy again."""
        if self._frozen is not None:
            self._use(self._frozen)
            self._frozen = None
            self.autocast = False

    def _use(self, module: nn.Module) -> None:
        self.module = module
        setattr(self.pipeline, self.component, module)

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA is attached, on or off."""
        return bool(getattr(self.module, "peft_config", None))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside this context `predict` and the pipeline are the reference: the adapter is off, or the frozen copy on.

        It does not affect gradients of earlier results. RuntimeError while the adapter is merged.
        """
        if self._frozen is not None:
            policy = self.module
            self._use(self._frozen)
            try:
                yield
            finally:
                self._use(policy)
                forget_passes(self._frozen)
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
        """Inside this context W + B A replaces W and the adapter is off, so `predict` is faster; do not train there.

        Afterwards the original tensors are back (peft's own unmerging leaves rounding errors). In half precision
        nothing is merged, because most of a small update would be rounded away; neither is an adapter that is off, nor
        one of a sharded network.
        """
        modules = self.module.modules() if self.dtype == torch.float32 and not self.is_sharded else ()
        layers = [layer for layer in modules if isinstance(layer, LoraLayer) and not layer.disable_adapters]
        if not layers:
            yield
            return
        weights = [layer.get_base_layer().weight for layer in layers]
        originals = [weight.data for weight in weights]
        try:
            with torch.no_grad():
                for layer, weight in zip(layers, weights, strict=True):
                    weight.data = weight.data + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
            self.module.disable_adapters()
            self._merged = True
            yield
        finally:
            self._merged = False
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original
            self.module.enable_adapters()
