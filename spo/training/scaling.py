"""Dynamic loss scaling, without which float16 loses what there is to learn.

SPO's loss is a mean over a latent's elements, so each element's gradient is some 1e-6 and what the layers make of it
is less; float16 holds nothing below 6e-8. The loss is therefore multiplied by a power of two before the backward pass
and the float32 gradients of the trained weights are divided by it after (Micikevicius et al., arXiv 1710.03740, 3.2).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn


@dataclass
class LossScale:
    """A factor that halves when a gradient overflows and doubles after `growth_interval` updates without.

    Being a power of two it changes no digit of what fits; its two numbers are all of its state. In other dtypes than
    float16 it is 1 and stays so.
    """

    value: float
    finite_updates: int = 0  # since the factor last changed
    growth_interval: int = 2000

    @classmethod
    def of(cls, dtype: torch.dtype) -> Self:
        return cls(2.0**16 if dtype == torch.float16 else 1.0)

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.value

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients, in place; to be done before they are clipped or looked at."""
        if self.value != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.value)

    def overflowed(self, finite: bool) -> bool:
        """Take note of an update's gradient; whether to leave the update out and go on with a smaller factor.

        False for a gradient that is not finite where the factor is 1: that is no matter of scale.
        """
        if self.value == 1:
            return False
        if not finite:
            self.value, self.finite_updates = self.value / 2, 0
            return True
        self.finite_updates += 1
        if self.finite_updates == self.growth_interval:
            self.value, self.finite_updates = self.value * 2, 0
        return False
