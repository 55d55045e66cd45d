"""Every method on one tiny random policy: how the tests of methods and of the training loop make them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spo.config import D3poConfig, DiffusionDpoConfig, GrpoConfig, SpoConfig
from spo.core.types import LabelledPairs, Pairs, Steps
from spo.methods.d3po import D3po
from spo.methods.diffusion_dpo import DiffusionDpo, NoisedPairs
from spo.methods.grpo import Grpo
from spo.methods.method import Examples, Method
from spo.methods.spo import Spo
from spo.models.latent_diffusion import LatentDiffusion

METHODS = ("spo", "d3po", "diffusion_dpo")  # of pairs
PROMPTS = ["a cat", "a dog", "a house", "a tree", "a boat"]
LABELS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.25, 0.75), (1.0, 0.0), (0.0, 1.0)]  # the third is a tie


class BrightnessScorer:
    """Prefers bright images; enough to tell candidates apart."""

    def encode(self, prompts):
        return torch.zeros(len(prompts), 1)

    def __call__(self, candidates):
        return 1e3 * candidates.images.mean(dim=(2, 3, 4))


def data(policy: LatentDiffusion) -> LabelledPairs:
    """Six preference pairs."""
    latents = torch.randn(len(LABELS), 2, *policy.latent_shape, generator=torch.Generator().manual_seed(7))
    return LabelledPairs.of(latents, torch.tensor(LABELS), torch.ones(len(LABELS)), [*PROMPTS, "a bird"])


def make_method(name: str, policy: LatentDiffusion, *, seed: int = 0, **settings) -> Method:
    """Small settings, over which `settings` go; batches of two, and nothing clipped."""
    sampled = {"prompts_per_rollout": 2, "threshold": 0.0, "clip_range": None}
    match name:
        case "spo":
            config = SpoConfig(**{**sampled, "candidates": 3, "first_step": 1, **settings})
            return Spo(config, policy, BrightnessScorer(), PROMPTS, seed=seed)
        case "d3po":
            config = D3poConfig(**{**sampled, "beta": 10.0, **settings})
            return D3po(config, policy, BrightnessScorer(), PROMPTS, seed=seed)
        case "grpo":
            own = {"prompts_per_rollout": 2, "candidates": 3, "clip_range": 0.5, **settings}
            return Grpo(GrpoConfig(**own), policy, BrightnessScorer(), PROMPTS, seed=seed)
        case "diffusion_dpo":
            config = DiffusionDpoConfig(**{"batch_size": 2, "beta": 200.0, **settings})
            return DiffusionDpo(config, policy, data(policy), seed=seed)
    raise ValueError(name)


def batch_settings(name: str, size: int) -> dict[str, int]:
    """The setting that makes a round larger or smaller."""
    return {"batch_size": size} if name == "diffusion_dpo" else {"prompts_per_rollout": size}


def swapped(pairs: Examples) -> Examples:
    """The same pairs with win and lose exchanged."""
    if isinstance(pairs, NoisedPairs):
        return replace(pairs, x_0=pairs.x_0.flip(1))
    assert isinstance(pairs, Pairs)
    x_t = pairs.x_t.flip(1) if pairs.x_t.shape[1] == 2 else pairs.x_t
    return replace(pairs, x_t=x_t, x_prev=pairs.x_prev.flip(1))


def what_is_learned(pairs: Examples) -> Tensor:
    """(n, 2, c, h, w): the wins and loses."""
    return pairs.x_0 if isinstance(pairs, NoisedPairs) else pairs.x_prev


def assert_a_step_raises_what_has_an_advantage(method: Method, steps: Steps) -> None:
    """At the policy that sampled them ratios are 1, and the advantages of a group cancel; a step lowers the loss."""
    loss = method.loss(steps)
    assert loss.metrics["ratio"].item() == pytest.approx(1, abs=1e-3)
    assert loss.value.item() == pytest.approx(0, abs=1e-3)
    loss.value.backward()
    trained = method.policy.network.parameters()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    torch.optim.SGD(trained, lr=0.02 / norm.item()).step()
    assert method.loss(steps).value < loss.value
