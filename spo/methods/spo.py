"""SPO: pairs from the policy's own denoising steps, judged step by step (arXiv 2406.04314)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spo.config import SpoConfig
from spo.core.noise import KeyedNoise
from spo.core.rollout import Segment, rollout
from spo.core.types import Conditioning, Denoiser, Scorer
from spo.methods.sampled import SampledMethod


class Spo(SampledMethod[SpoConfig]):
    """SPO: candidates of one step, judged at each step."""

    def __init__(self, config: SpoConfig, policy: Denoiser, scorer: Scorer, prompts: Sequence[str], *, seed: int = 0):
        judge = scorer if config.judged_at is None else BlindScorer(scorer, config.judged_at)
        super().__init__(config, policy, judge, prompts, seed=seed)

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


class BlindScorer:
    """A preference model that is told one timestep, whatever the image's is (the paper's ablation)."""

    def __init__(self, scorer: Scorer, t: int):
        self.scorer = scorer
        self.t = t

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.scorer.encode(prompts)

    def __call__(self, images: Tensor, text: Tensor, t: Tensor) -> Tensor:
        return self.scorer(images, text, torch.full_like(t, self.t))
