"""Optimizer steps: gradients are scaled in float16, summed over processes, clipped and checked."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from spo.runtime import distributed
from spo.runtime.checkpoint import pack_optimizer, unpack_optimizer
from spo.runtime.sharding import gathered, local, part_of, total_norm
from spo.training.guards import FiniteGuard


class Updater:
    """Makes the updates of one optimizer and skips those whose loss or gradient is not finite.

    In float16 torch's GradScaler multiplies the loss by a power of two, because SPO's small gradients would become 0
    (Micikevicius et al., arXiv 1710.03740, section 3.2). An overflow lowers the factor; only if the factor is already 1
    does `guard` count it as a bad update.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, guard: FiniteGuard, *, dtype: torch.dtype, max_grad_norm: float | None
    ):
        self.optimizer = optimizer
        self.guard = guard
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradient_sum = distributed.GradientSum(self.parameters)
        self.is_sharded = any(local(each) is not each for each in self.parameters)
        self.scaler = GradScaler(self.parameters[0].device.type, enabled=dtype == torch.float16)
        self.max_grad_norm = max_grad_norm or math.inf

    def backward(self, loss: Tensor, *, last: bool = False) -> None:
        """Add the gradient of the loss (); in the last pass of an update sums over processes start meanwhile."""
        if last:
            self.gradient_sum.expect_last_pass()
        self.scaler.scale(loss).backward()

    def clip_gradient(self) -> Tensor:
        """Complete the sums over processes, remove the float16 factor and clip; the norm () before clipping."""
        self.gradient_sum.finish()
        # else unscale_ fails in a process that had no example yet
        self.scaler.scale(torch.zeros((), device=self.parameters[0].device))
        self.scaler.unscale_(self.optimizer)
        norm = total_norm(each.grad for each in self.parameters if each.grad is not None)
        nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        return norm

    def step(self, loss: float, grad_norm: float, *, learning_rate: float) -> bool:
        """Make the update after `clip_gradient`; False if it is skipped. TrainingError after too many bad ones."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        overflow = not finite and math.isfinite(loss) and self.scaler.get_scale() > 1
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return not overflow and self.guard.allows(loss, grad_norm)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that updates change: weights and other tensors, and values for JSON.

        Sharded tensors are gathered on the CPU of the first process, so all processes must call this; the others get
        no tensors.
        """
        tensors, numbers = pack_optimizer(self.optimizer)
        weights = {f"weight.{i}": parameter.detach() for i, parameter in enumerate(self.parameters)}
        values = {"optimizer": numbers, "scaler": self.scaler.state_dict(), "skipped": self.guard.skipped}
        tensors = {**weights, **tensors}
        return gathered(tensors) if self.is_sharded else tensors, values

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore what `state` returned, with or without sharding."""
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(part_of(tensors[f"weight.{i}"], parameter))
        moments = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
        own = {name: part_of(each, self.parameters[int(name.split(".")[1])]) for name, each in moments.items()}
        unpack_optimizer(self.optimizer, own, values["optimizer"])
        self.scaler.load_state_dict(values["scaler"])
        self.guard.skipped = values["skipped"]
