"""The loop trains a method without pairs: candidates with advantages, as in policy-gradient methods."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spo.config import AlignConfig
from spo.core.gaussian import log_prob
from spo.core.noise import KeyedNoise
from spo.core.rollout import rollout
from spo.core.types import Conditioning, Loss
from spo.methods.method import Round, Tally
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import add_lora
from spo.tracking import NullTracker
from spo.training.align import align
from tests.methods.tiny import PROMPTS, BrightnessScorer
from tests.models.tiny import make_tiny_denoiser

K = 3


@dataclass(frozen=True)
class Advantages:
    """Every candidate of a step with its advantage over the others of its x_t."""

    x_t: Tensor  # (n, c, h, w)
    x_prev: Tensor  # (n, k, c, h, w)
    t: Tensor  # (n,)
    t_prev: Tensor  # (n,)
    cond: Conditioning  # n
    advantage: Tensor  # (n, k)

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index):
        return Advantages(
            self.x_t[index],
            self.x_prev[index],
            self.t[index],
            self.t_prev[index],
            self.cond[index],
            self.advantage[index],
        )

    @staticmethod
    def cat(parts: "list[Advantages]") -> "Advantages":
        fields = [torch.cat([getattr(part, name) for part in parts]) for name in ("x_t", "x_prev", "t", "t_prev")]
        cond = Conditioning.cat([part.cond for part in parts])
        return Advantages(*fields, cond, torch.cat([part.advantage for part in parts]))


class PolicyGradient:
    """-advantage log p of every candidate: REINFORCE with the group's mean as its baseline. One round an epoch."""

    rounds_per_epoch = 1

    def __init__(self, policy: LatentDiffusion):
        self.policy = policy
        self.scorer = BrightnessScorer()

    def collect(self, epoch: int, *, skip: int = 0) -> Iterator[Round[Advantages]]:
        cond, text = self.policy.encode(PROMPTS), self.scorer.encode(PROMPTS)
        noise = KeyedNoise(0, epoch, range(len(PROMPTS)))
        parts = []
        for segment in rollout(
            self.policy, self.scorer, cond, text, candidates=K, first_step=1, branch_steps=1, noise=noise
        ):
            x_t, x_prev = segment.latents
            t, t_prev = (torch.full((len(cond),), time) for time in segment.times)
            centred = segment.scores - segment.scores.mean(dim=0)
            advantage = (centred / (centred.std(dim=0) + 1.0)).T
            parts.append(Advantages(x_t[0], x_prev.transpose(0, 1), t, t_prev, cond, advantage))
        tallies = [Tally(part.t[0].item(), len(part), len(part), 1.0) for part in parts]
        yield Round(Advantages.cat(parts), tallies)

    def loss(self, examples: Advantages) -> Loss:
        output = self.policy.predict(examples.x_t, examples.t, examples.cond)
        step = self.policy.transition(output, examples.x_t, examples.t, examples.t_prev)
        value = -(examples.advantage * log_prob(step, examples.x_prev)).mean()
        return Loss(value, {"advantage": examples.advantage.abs().mean()})


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> tuple[LatentDiffusion, dict, PolicyGradient]:
    policy = make_tiny_denoiser("sd15", folder)
    config = AlignConfig(epochs=1, batch_size=8, checkpoints=1)
    add_lora(policy.network.module, config.lora, seed=0)
    method = PolicyGradient(policy)
    return policy, align(method, policy, config, tmp_path / "out", NullTracker()), method


def test_a_method_without_pairs_trains_saves_and_counts_its_examples(trained, tmp_path: Path) -> None:
    policy, metrics, _ = trained
    steps = len(policy.timesteps) - 1
    assert metrics["num_examples"] == steps * len(PROMPTS)
    assert metrics["kept_share"] == 1.0
    assert metrics["updates"] == 3  # batches of 8 out of 5 * 4 examples
    assert any(weight.abs().max() > 0 for weight in policy.network.parameters()[1::2])
    assert (tmp_path / "out" / "checkpoints").is_dir()


def test_its_advantages_sum_to_0_in_each_group(trained) -> None:
    _, _, method = trained
    examples = next(iter(method.collect(0))).examples
    torch.testing.assert_close(examples.advantage.sum(dim=1), torch.zeros(len(examples)), atol=1e-3, rtol=0)
