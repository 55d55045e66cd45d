"""How two trainings are compared that should differ by the rounding of sums alone.

Steps are taken without Adam: it divides a gradient by its size, so the rounding of one near 0 becomes a whole step, and
how large that is depends on the processor's kernels. What is compared is compared relative to its norm.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from spo.runtime.sharding import whole

ROUNDING = 1e-3  # of a norm: far above the rounding of a sum, and far below a fault


class PlainSteps(torch.optim.SGD):
    """Steps along the gradient, which are as long as it is; remembers each gradient, in full."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], learning_rate: float):
        super().__init__(parameters, lr=learning_rate)
        self.gradients: list[Tensor] = []

    def step(self, closure: None = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        self.gradients.append(flat(map(whole, gradients)).clone())
        super().step()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def assert_same_up_to_rounding(ours: Tensor, theirs: Tensor) -> None:
    assert ours.norm() > 0
    assert (theirs - ours).norm() < ROUNDING * ours.norm()
