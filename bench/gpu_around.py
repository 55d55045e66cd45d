"""What stands around a part of SPO while a switch is on; afterwards everything is as before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from spo.models.latent_diffusion import LatentDiffusion


@contextmanager
def cast(policy: LatentDiffusion, dtype: torch.dtype) -> Iterator[None]:
    """The frozen weights of UNet and VAE in another dtype; the very tensors of before stand again afterwards."""
    before, frozen = policy.dtype, _frozen(policy.network.module) + _frozen(policy.autoencoder.vae)
    originals = [weight.data for weight in frozen]
    try:
        for weight in frozen:
            weight.data = weight.data.to(dtype)
        policy.network.dtype = dtype
        yield
    finally:
        policy.network.dtype = before
        for weight, original in zip(frozen, originals, strict=True):
            weight.data = original


@contextmanager
def merged(policy: LatentDiffusion) -> Iterator[None]:
    """The adapter added into the weights, in the weights' own dtype: a sum with a float32 adapter is float32."""
    dtype = policy.dtype
    with changed(policy.network, "dtype", torch.float32), policy.network.merged(), cast(policy, dtype):
        yield


@contextmanager
def channels_first(policy: LatentDiffusion) -> Iterator[None]:
    """Frozen weights in the order of rows; afterwards as before."""
    frozen = _frozen(policy.network.module) + _frozen(policy.autoencoder.vae)
    originals = [weight.data for weight in frozen]
    try:
        for weight in frozen:
            weight.data = weight.data.contiguous()
        yield
    finally:
        for weight, original in zip(frozen, originals, strict=True):
            weight.data = original


@contextmanager
def without_tf32() -> Iterator[None]:
    """No TF32 in matrix products; cuDNN's convolutions have it anyway."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def cudnn_attention() -> Iterator[None]:
    """cuDNN may compute attention, which `spo.runtime.libraries` forbids."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def autocast(policy: LatentDiffusion) -> Iterator[None]:
    """Below float32 the network runs under autocast, and peft casts what goes into the LoRA to float32."""
    layers = [layer for layer in policy.network.module.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    try:
        with changed(policy.network, "autocast", True):
            yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = False


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """cuDNN tries its algorithms at every new shape of a convolution, and keeps the fastest."""
    with changed(torch.backends.cudnn, "benchmark", True):
        yield


@contextmanager
def checkpointed(unet: Any) -> Iterator[None]:
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


@contextmanager
def gradients(weights: list[nn.Parameter]) -> Iterator[None]:
    """Every weight has a gradient of zeros."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    try:
        yield
    finally:
        for weight in weights:
            weight.grad = None


@contextmanager
def changed(owner: Any, name: str, value: object) -> Iterator[None]:
    """An attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _frozen(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if not weight.requires_grad]
