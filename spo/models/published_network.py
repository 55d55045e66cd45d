"""Published weights of the whole denoising network, such as LPO's merged UNets (hub: casiatao/LPO)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from spo.errors import ModelError
from spo.models.network import Network
from spo.runtime import hub

EXPECTED = "it should be a network that diffusers' save_pretrained wrote, with .safetensors weights"


@contextmanager
def published_network(
    network: Network, source: str | Path, *, subfolder: str | None = None, revision: str | None = None
) -> Iterator[None]:
    """Inside this context the pipeline has a published network in the place of its own; afterwards it is the base.

    source: a folder or a hub repository; the weights are in its `subfolder`. ModelError if they are missing or of
    another architecture.
    """
    network.restore()
    if network.has_adapter:
        network.module.unload_lora()
    with hub.loading(f"network {source}", source, "its place", EXPECTED):
        module = type(network.module).from_pretrained(
            str(source), subfolder=subfolder, revision=revision, dtype=network.dtype, use_safetensors=True
        )
    shapes = [{name: weight.shape for name, weight in net.state_dict().items()} for net in (module, network.module)]
    if shapes[0] != shapes[1]:
        raise ModelError(f"network {source} has other layers than the base model's; name one made for this base")
    network.replace(module.to(network.device, memory_format=torch.channels_last))
    try:
        yield
    finally:
        network.restore()
