"""D3PO: pairs of whole trajectories, judged once at their ends (arXiv 2311.13231).

Two trajectories of a prompt part at the first step, from one initial noise; the better end makes every step of its
trajectory a win. That is SPO's rollout with two candidates and a single segment, which is as long as the sampler.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from spo.config import D3poConfig
from spo.core.noise import KeyedNoise
from spo.core.rollout import Segment, rollout
from spo.core.types import Conditioning, Denoiser, Loss, Pairs, Scorer
from spo.methods.method import Round
from spo.methods.sampled import rounds_per_epoch, sampled_rounds, step_loss


class D3po:
    """What D3PO collects and what it minimises; the published one asks people, here a preference model judges."""

    def __init__(self, config: D3poConfig, policy: Denoiser, scorer: Scorer, prompts: Sequence[str], *, seed: int = 0):
        self.config = config
        self.policy = policy
        self.scorer = scorer
        self.prompts = list(prompts)
        self.seed = seed

    @property
    def rounds_per_epoch(self) -> int:
        return rounds_per_epoch(self.config, self.prompts)

    def collect(self, epoch: int, *, skip: int = 0) -> Iterator[Round[Pairs]]:
        """The step pairs of each batch of prompts; to be trained on before the next is asked for."""
        return sampled_rounds(
            self.config, self.policy, self.scorer, self.prompts, self._roll, seed=self.seed, epoch=epoch, skip=skip
        )

    def _roll(self, cond: Conditioning, text: Tensor, noise: KeyedNoise) -> Iterator[Segment]:
        return rollout(
            self.policy,
            self.scorer,
            cond,
            text,
            candidates=2,
            first_step=0,
            branch_steps=len(self.policy.timesteps),
            threshold=self.config.threshold,
            noise=noise,
        )

    def loss(self, pairs: Pairs) -> Loss:
        """The loss of single steps, the ratios clamped as in the published code."""
        return step_loss(self.policy, pairs, beta=self.config.beta, clip_range=self.config.clip_range)
