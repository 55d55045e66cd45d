"""Random numbers keyed by their purpose: (seed, epoch, prompt, step, purpose).

They do not depend on batching, the number of processes, the order of calls, or whether a run was resumed. The
published code draws from one global generator in each process.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

_NORMAL, _CHOICE = 0, 1  # purposes


class KeyedNoise:
    """types.Noise for a batch of prompts; each prompt has an integer id that it keeps for the whole run.

    Numbers are drawn on the CPU and moved to `device`, so they are the same on every device. Equal ids get equal
    numbers. torch's CPU generator keeps 32 bits of its seed, so a few unrelated draws of a run coincide by chance,
    which is harmless. Raises ValueError for no prompts.
    """

    def __init__(self, seed: int, epoch: int, prompt_ids: Sequence[int], device: torch.device | str = "cpu"):
        if not prompt_ids:
            raise ValueError("noise needs at least one prompt, got none")
        self.seed = seed
        self.epoch = epoch
        self.prompt_ids = list(prompt_ids)
        self.device = device

    def normal(self, step: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (b, *shape), float32, for grid step `step`; step -1 is the initial latent."""
        draws = [torch.randn(shape, generator=generator) for generator in self._generators(step, _NORMAL)]
        return torch.stack(draws).to(self.device)

    def choice(self, step: int, k: int) -> Tensor:
        """Uniform int64 (b,) in [0, k) for grid step `step`."""
        draws = [torch.randint(k, (), generator=generator) for generator in self._generators(step, _CHOICE)]
        return torch.stack(draws).to(self.device)

    def _generators(self, step: int, purpose: int) -> list[Generator]:
        return [
            Generator().manual_seed(_key(self.seed, self.epoch, prompt_id, step, purpose))
            for prompt_id in self.prompt_ids
        ]


def seed_of(data: bytes) -> int:
    """A 63-bit seed from BLAKE2b, the same in every process and Python version (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch or step (counted from 0) of the run with this seed."""
    return seed * 1_000_003 + epoch


def _key(*numbers: int) -> int:
    return seed_of(struct.pack(f"<{len(numbers)}q", *numbers))
