"""A LoRA added into the weights for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer


@contextmanager
def merged_adapter(unet: UNet2DConditionModel) -> Iterator[None]:
    """Within it, W + B A stands for W and the adapter is off; afterwards the very tensors of before stand again.

    An adapter that is off already is left out. peft's own unmerging subtracts what it added, which leaves rounding.
    """
    layers = [layer for layer in unet.modules() if isinstance(layer, LoraLayer) and not layer.disable_adapters]
    if not layers:
        yield
        return
    weights = [layer.get_base_layer().weight for layer in layers]
    originals = [weight.data for weight in weights]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, weights, strict=True):
                weight.data = weight.data + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
        unet.disable_adapters()
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original
        unet.enable_adapters()
