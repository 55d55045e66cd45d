"""The optimizer of every training."""

import torch
from torch import nn

from spo.errors import ConfigError


def adamw(
    parameters: list[nn.Parameter], *, lr: float = 1e-3, weight_decay: float, eight_bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW; in one kernel on a GPU, where that is 5 to 19 times faster (docs/performance.md).

    eight_bit: the moments of weights with 4096 numbers or more take 8 bits each instead of 32 (Dettmers et al., arXiv
    2110.02861); ConfigError without bitsandbytes.
    """
    if eight_bit:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ConfigError("eight_bit=true needs bitsandbytes; `pip install -e .[gpu]`, or set it false") from None
        return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)
    fused = True if parameters[0].is_cuda else None
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
