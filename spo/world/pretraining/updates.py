"""The optimizer of every part of the embedded default."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def updates(
    parameters: list[nn.Parameter],
    steps: int,
    learning_rate: float,
    *,
    warm_up: float,
    floor: float,
    weight_decay: float = 1e-3,
) -> Iterator[Callable[[Tensor], None]]:
    """For each step a function that makes an AdamW update from a loss.

    The rate rises over `warm_up` steps and decays linearly to `floor` times its value.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / warm_up) * ((1 - floor) * (1 - step / steps) + floor)
        yield update
