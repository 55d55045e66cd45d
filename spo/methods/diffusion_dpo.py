"""Diffusion-DPO: noised pairs of a data set (arXiv 2311.12908). This is the offline baseline; nothing is sampled.

The two images of a pair are noised to one random timestep with the same noise. The policy learns to improve on the
reference's denoising more for the winner than for the loser. One round is one update.

As in the published code, T omega(lambda_t) is constant and part of beta, errors are means over (c, h, w), beta is
halved, some captions are dropped, and there is no guidance. Unlike there, images are encoded once, to the mean of the
posterior, and never mirrored; the larger label decides a pair, and ties are dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Generator, Tensor

from spo.config import DiffusionDpoConfig
from spo.core.losses import dpo_loss, log_ratio
from spo.core.noise import KeyedNoise, epoch_seed
from spo.core.types import Conditioning, Denoiser, LabelledPairs, Loss, Rows
from spo.methods.method import Inputs, Round, Tally

NOISE, TIMESTEP, DROPOUT = range(3)  # purposes of a pair's random numbers
ENCODED_AT_A_TIME = 256  # captions
FINE = 2**31  # a uniform integer below it, divided by it, is a uniform number in [0, 1)


class NoisingDenoiser(Denoiser, Protocol):
    """A Denoiser that can be trained on noised data."""

    @property
    def sampler(self) -> Any:
        """A spo.models.sampler.Sampler: its schedule, `add_noise` and `target`."""
        ...


@dataclass(frozen=True, kw_only=True)
class NoisedPairs(Rows):
    """Win-lose pairs of clean latents, and the noise for both; index 0 of the second axis is the win."""

    x_0: Tensor  # (n, 2, c, h, w)
    noise: Tensor  # (n, c, h, w)


class DiffusionDpo:
    """Trains on the decided pairs of a data set.

    policy: without guidance. The index of a pair among the decided ones is its id, which keys its noise.
    Raises ValueError if all pairs are ties.
    """

    def __init__(self, config: DiffusionDpoConfig, policy: NoisingDenoiser, pairs: LabelledPairs, *, seed: int = 0):
        label = pairs.label
        decided = (label[:, 0] != label[:, 1]).nonzero().flatten()
        if not len(decided):
            raise ValueError(f"all of {len(label)} pairs are ties; Diffusion-DPO needs decided ones")
        self.config = config
        self.policy = policy
        self.pairs = pairs
        self.decided = decided  # (p,)
        self.win = label[decided].argmax(dim=1)  # (p,)
        self.margin = (label[decided, 0] - label[decided, 1]).abs()  # (p,)
        self.seed = seed

    @classmethod
    def build(cls, config: DiffusionDpoConfig, inputs: Inputs, *, seed: int) -> Self:
        return cls(config, inputs.policy, inputs.load_pairs(), seed=seed)

    @cached_property
    def rounds_per_epoch(self) -> int:
        whole = sum(-(-len(places) // self.config.batch_size) for places in self.pairs.by_bucket(self.decided))
        return min(self.config.updates_per_epoch or whole, whole)

    def collect(self, epoch: int, *, skip: int = 0) -> Iterator[Round[NoisedPairs]]:
        """The pairs of each update; an epoch visits every decided pair once, in its own order.

        The pairs of an update are of one bucket.
        """
        for index in self._updates(epoch)[skip : self.rounds_per_epoch]:
            pairs = self._noised(epoch, index)
            margins = self.margin[index].tolist()
            yield Round(pairs, [Tally(t, 1, 1, m) for t, m in zip(pairs.t.tolist(), margins, strict=True)])

    def _updates(self, epoch: int) -> list[Tensor]:
        """The decided pairs of each update of an epoch."""
        generator = Generator().manual_seed(epoch_seed(self.seed, epoch))
        order = torch.randperm(len(self.decided), generator=generator)
        buckets = self.pairs.by_bucket(self.decided[order])
        updates = [index for places in buckets for index in order[places].split(self.config.batch_size)]
        if len(buckets) > 1:
            updates = [updates[i] for i in torch.randperm(len(updates), generator=generator).tolist()]
        return updates

    def _noised(self, epoch: int, index: Tensor) -> NoisedPairs:
        """The pairs at `index` (n,) with their random numbers, on the policy's device."""
        noise = KeyedNoise(self.seed, epoch, index.tolist())
        device = self.policy.timesteps.device
        rows, win = self.decided[index], self.win[index]
        latents = self.pairs.latents(rows)  # (n, 2, c, h, w)
        x_0 = torch.where(win.view(-1, 1, 1, 1, 1) == 0, latents, latents.flip(1))
        t = noise.choice(TIMESTEP, self.policy.sampler.schedule.num_timesteps)
        dropped = (noise.choice(DROPOUT, FINE) / FINE < self.config.empty_captions).tolist()
        captions = ["" if drop else self.pairs.captions[i] for i, drop in zip(rows.tolist(), dropped, strict=True)]
        starts = range(0, len(captions), ENCODED_AT_A_TIME)
        cond = Conditioning.cat([self.policy.encode(captions[i : i + ENCODED_AT_A_TIME]) for i in starts])
        normal = noise.normal(NOISE, tuple(x_0.shape[2:]))
        return NoisedPairs(x_0=x_0.to(device), noise=normal.to(device), t=t.to(device), cond=cond)

    def loss(self, pairs: NoisedPairs) -> Loss:
        """-log sigmoid(-beta / 2 ((error_w - error_w_ref) - (error_l - error_l_ref))) (the paper's section 4, with
        the published code's constants), computed as DPO's loss with log p = -error / 2.
        """
        log_p = denoising_log_prob(self.policy, pairs)
        with torch.no_grad(), self.policy.reference():
            log_p_ref = denoising_log_prob(self.policy, pairs)
        return dpo_loss(log_ratio(log_p, log_p_ref), beta=self.config.beta)


def denoising_log_prob(policy: NoisingDenoiser, pairs: NoisedPairs) -> Tensor:
    """-1/2 the mean squared error over (c, h, w) of the model output for win and lose (n, 2)."""
    x_0 = pairs.x_0.flatten(0, 1)  # (n * 2, c, h, w)
    noise, t = pairs.noise.repeat_interleave(2, dim=0), pairs.t.repeat_interleave(2)
    output = policy.predict(policy.sampler.add_noise(x_0, noise, t), t, pairs.cond.repeat_interleave(2))
    target = policy.sampler.target(x_0, noise, t)
    return -0.5 * (output - target).square().mean(dim=(1, 2, 3)).unflatten(0, (-1, 2))


METHOD = DiffusionDpo
