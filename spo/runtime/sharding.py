"""A module whose weights are divided among the processes (torch's FSDP2, `fully_shard`).

Each process holds a part of every weight, of its gradient and of what the optimizer keeps for it. A block's weights are
gathered when the block is used and dropped afterwards; gradients are summed into the parts during the backward pass. So
every process must make the same forward and backward passes in the same order. The number of samples may differ.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from spo.runtime import distributed


def shard(module: nn.Module, kinds: Iterable[str]) -> None:
    """Leave this process its part of the module's weights; call it in all processes.

    kinds: names of the classes of the blocks whose weights are gathered together. The weights outside of them are
    gathered during the whole pass. All processes must hold the same weights before.
    """
    # some blocks put out views, which nothing in diffusers' networks changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (distributed.count(),))
    cast(Any, module).to(memory_format=torch.contiguous_format)  # FSDP2 takes no other layout
    blocks = [each for each in module.modules() if type(each).__name__ in set(kinds)]
    for each in (*blocks, module):
        sharded = fully_shard(each, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)  # sums, not means
        sharded.set_force_sum_reduction_for_comms(True)


def plain_class(module: nn.Module) -> Any:
    """The class of a sharded module before `shard`, which derives one from it."""
    return type(module).__bases__[1]


def forget_passes(module: nn.Module) -> None:
    """Drop the record of forward passes, which FSDP2 keeps until a backward pass, from a module that has none."""
    if isinstance(module, FSDPModule):
        module.reset_iter_state()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in full, in all processes, which must all call this; or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors in full on the first process's CPU, gathered one after another; nothing in the others."""
    copies = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if distributed.is_main():
            copies[name] = full.to("cpu", copy=True)
    return copies


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a full tensor that a process has of `parameter`, which has its shape; or the tensor itself."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm () of all gradients together; of sharded ones over all processes, which must all call this."""
    gradients = list(gradients)
    norm = nn.utils.get_total_norm([local(each) for each in gradients])
    if not any(isinstance(each, DTensor) for each in gradients):
        return norm
    square = norm.square()
    dist.all_reduce(square)
    return square.sqrt()
