"""SPO: pairs from the policy's own denoising steps, judged step by step (arXiv 2406.04314)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spo.config import SpoConfig
from spo.core.noise import KeyedNoise
from spo.core.rollout import Segment, rollout
from spo.core.types import Conditioning, Denoiser, Loss, Pairs, Scorer
from spo.methods.method import Round
from spo.methods.sampled import rounds_per_epoch, sampled_rounds, step_loss


class Spo:
    """What SPO collects and what it minimises.

    prompts: the training prompts; a prompt is known by its index in them, to which all its noise is keyed.
    """

    def __init__(self, config: SpoConfig, policy: Denoiser, scorer: Scorer, prompts: Sequence[str], *, seed: int = 0):
        self.config = config
        self.policy = policy
        self.scorer = scorer if config.judged_at is None else BlindScorer(scorer, config.judged_at)
        self.prompts = list(prompts)
        self.seed = seed

    @property
    def rounds_per_epoch(self) -> int:
        return rounds_per_epoch(self.config, self.prompts)

    def collect(self, epoch: int, *, skip: int = 0) -> Iterator[Round[Pairs]]:
        """The pairs of each batch of prompts; to be trained on before the next is asked for."""
        return sampled_rounds(
            self.config, self.policy, self.scorer, self.prompts, self._roll, seed=self.seed, epoch=epoch, skip=skip
        )

    def _roll(self, cond: Conditioning, text: Tensor, noise: KeyedNoise) -> Iterator[Segment]:
        return rollout(
            self.policy,
            self.scorer,
            cond,
            text,
            candidates=self.config.candidates,
            first_step=self.config.first_step,
            branch_steps=self.config.branch_steps,
            threshold=self.config.threshold,
            noise=noise,
            continue_from=self.config.continue_from,
            pairing=self.config.pairing,
        )

    def loss(self, pairs: Pairs) -> Loss:
        """DPO's loss of single steps, the ratios clamped (paper, eq. 9; published code for the clamp)."""
        return step_loss(self.policy, pairs, beta=self.config.beta, clip_range=self.config.clip_range)


class BlindScorer:
    """A preference model that is told one timestep, whatever the image's is (the paper's ablation)."""

    def __init__(self, scorer: Scorer, t: int):
        self.scorer = scorer
        self.t = t

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.scorer.encode(prompts)

    def __call__(self, images: Tensor, text: Tensor, t: Tensor) -> Tensor:
        return self.scorer(images, text, torch.full_like(t, self.t))
