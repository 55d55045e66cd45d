from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from spo.core.gaussian import log_prob
from spo.core.losses import dpo_loss, log_ratio, preference_loss
from spo.core.prediction import guide
from spo.core.step import gaussian_step
from tests.schedules import previous, stable_diffusion

GOLDEN = Path(__file__).parent


def pair_log_prob(unet, golden):
    """log p (n, 2) of win and lose, which share x_t, by the UNet with guidance 5."""
    x_t, t, positive = golden["loss.latents"], golden["loss.timesteps"], golden["loss.prompt_embeds"]
    negative = golden["loss.negative_prompt_embeds"].expand_as(positive)
    output = unet(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([negative, positive])).sample
    transition = gaussian_step(
        guide(*output.chunk(2), 5.0),
        x_t,
        t,
        previous(t, steps=20),
        schedule=stable_diffusion(),
        eta=1.0,
        prediction_type="epsilon",
    )
    return log_prob(transition, torch.stack([golden["loss.win"], golden["loss.lose"]], dim=1))


@pytest.fixture(scope="module")
def policy():
    return UNet2DConditionModel.from_pretrained(GOLDEN / "unet_policy")


@pytest.fixture(scope="module")
def log_p_ref(golden):
    with torch.no_grad():
        return pair_log_prob(UNet2DConditionModel.from_pretrained(GOLDEN / "unet_ref"), golden)


def published(golden, name):
    """(n, 2) of the win's and the lose's figures."""
    return torch.stack([golden[f"loss.{name}_win"], golden[f"loss.{name}_lose"]], dim=1)


def test_spo_loss_ratios_and_gradients_are_the_published_ones(golden, policy, log_p_ref):
    policy.zero_grad()
    log_p = pair_log_prob(policy, golden)
    ratio = log_ratio(log_p, log_p_ref, clip_range=0.1)
    loss = dpo_loss(ratio, beta=10.0)
    loss.value.backward()

    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(log_p.detach(), published(golden, "log_prob"), **close)
    torch.testing.assert_close(log_p_ref, published(golden, "ref_log_prob"), **close)
    torch.testing.assert_close(ratio.detach().exp(), published(golden, "ratio"), **close)
    torch.testing.assert_close(loss.value.detach(), golden["loss.value"].squeeze(), **close)
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(norm, golden["loss.grad_norm"].squeeze(), **close)
    to_q = next(gradient for name, gradient in gradients.items() if "to_q.weight" in name)
    torch.testing.assert_close(to_q, golden["loss.grad_to_q0"], rtol=1e-4, atol=1e-6)


def test_some_published_ratios_are_clamped_and_some_are_not(golden):
    """So that the test above sees both branches."""
    clamped = (published(golden, "ratio") - 1).abs() > 0.0999
    assert clamped.any()
    assert not clamped.all()


def test_the_preference_loss_is_the_published_criterion():
    figures = load_file(GOLDEN / "spm_criterion.safetensors")
    text = F.normalize(figures["text"], dim=-1)
    images = F.normalize(torch.stack([figures["image_0"], figures["image_1"]], dim=1), dim=-1)  # (n, 2, d)
    scores = figures["logit_scale"] * (images @ text.unsqueeze(-1)).squeeze(-1)
    label = torch.stack([figures["label_0"], figures["label_1"]], dim=1)
    loss = preference_loss(scores, label, 1 / figures["examples_per_prompt"])
    torch.testing.assert_close(loss.value, figures["loss"].squeeze(), rtol=1e-5, atol=1e-5)
