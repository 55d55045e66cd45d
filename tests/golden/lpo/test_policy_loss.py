"""The published policy loss: SPO's with beta 500."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from spo.config import SpoConfig
from spo.core.losses import dpo_loss, log_ratio
from spo.core.types import Conditioning, Loss, Pairs
from spo.methods.sampled import step_log_prob
from spo.methods.spo import Spo
from spo.models.latent_diffusion import LatentDiffusion
from tests.golden.lpo.conftest import LPO, assert_near
from tests.golden.lpo.policies import make_policy
from tests.schedules import previous

Figures = dict[str, Tensor]


@pytest.fixture(scope="module")
def policy(settings: dict[str, Any]) -> LatentDiffusion:
    """`unet_policy`, all of which trains; its reference is `unet_ref`."""
    policy = make_policy("unet_ref", "lrm_sd15", settings["trace"]["scheduler"], steps=20)
    policy.network.replace(UNet2DConditionModel.from_pretrained(LPO / "unet_policy"))
    policy.network.module.requires_grad_(True)
    return policy


@pytest.fixture(scope="module")
def pairs(figures: Figures) -> Pairs:
    embeds, t = figures["loss.prompt_embeds"], figures["loss.timesteps"]
    negative = figures["loss.negative_prompt_embeds"].expand_as(embeds)
    return Pairs(
        x_t=figures["loss.latents"].unsqueeze(1),
        x_prev=torch.stack([figures["loss.win"], figures["loss.lose"]], dim=1),
        t=t,
        t_prev=previous(t, steps=20),
        cond=Conditioning({"prompt_embeds": embeds, "negative_prompt_embeds": negative}),
        margin=torch.ones(len(t)),
    )


@pytest.fixture(scope="module")
def loss(policy: LatentDiffusion, pairs: Pairs) -> Loss:
    loss = lpo(policy).loss(pairs)
    loss.value.backward()
    return loss


def lpo(policy: LatentDiffusion) -> Spo:
    """SPO with LPO's constants; no preference model, since nothing is sampled here."""
    return Spo(SpoConfig(beta=500.0, clip_range=0.1), policy, None, ["a prompt"])  # type: ignore[arg-type]


def both(figures: Figures, name: str) -> Tensor:
    """(n, 2) of the win's and the lose's figures."""
    return torch.stack([figures[f"loss.{name}_win"], figures[f"loss.{name}_lose"]], dim=1)


@torch.no_grad()
def test_log_densities_are_the_published_ones(policy: LatentDiffusion, pairs: Pairs, figures: Figures):
    assert_near(step_log_prob(policy, pairs), both(figures, "log_prob"))
    with policy.reference():
        assert_near(step_log_prob(policy, pairs), both(figures, "ref_log_prob"))


def test_ratios_and_loss_are_the_published_ones(loss: Loss, figures: Figures):
    assert loss.log_ratio is not None
    assert_near(loss.log_ratio.exp(), both(figures, "ratio"))
    assert_near(loss.value.reshape(1), figures["loss.value"])
    assert_near(loss.metrics["accuracy"].reshape(1), figures["loss.implicit_accuracy"])


def test_gradients_are_the_published_ones(
    policy: LatentDiffusion, loss: Loss, figures: Figures, settings: dict[str, Any]
):
    gradients = {name: parameter.grad for name, parameter in policy.network.module.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert_near(norm.reshape(1), figures["loss.grad_norm"], 1e-3)
    assert_near(gradients[settings["loss"]["grad_to_q0"]], figures["loss.grad_to_q0"], 1e-3)


@pytest.mark.parametrize("lose", [1.1, 1.09])
def test_the_loss_is_finite_where_the_published_one_is_not(settings: dict[str, Any], lose: float):
    """A win at its lower clamp, and a lose at its upper one or just below, where there is a gradient.

    Theirs is -log(sigmoid(logit)): infinite, and with a NaN gradient at 1.09.
    """
    assert {case["loss"] for case in settings["overflow"].values()} == {"inf"}
    log_p = torch.tensor([[0.8, lose]]).log().requires_grad_()
    value = dpo_loss(log_ratio(log_p, torch.zeros(1, 2), clip_range=0.1), beta=500.0).value
    value.backward()
    torch.testing.assert_close(value.detach(), 500 * torch.tensor(lose / 0.9).log(), rtol=1e-4, atol=0)
    assert log_p.grad is not None and log_p.grad.isfinite().all()
    if lose < 1.1:
        assert log_p.grad[0, 1] == pytest.approx(500)
