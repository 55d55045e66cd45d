"""A merged adapter is the same policy, and leaves no trace."""

import pytest
import torch

from spo.config import LoraConfig
from spo.models.lora import add_lora
from tests.models.tiny import draw_latents, make_tiny_denoiser, shake

T = torch.tensor([801, 1])


@pytest.fixture
def policy(denoiser):
    add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
    shake(denoiser)
    return denoiser


@torch.no_grad()
def predict(denoiser):
    return denoiser.predict(draw_latents(denoiser, 2), T, denoiser.encode(["a cat", "fog"]))


def test_the_merged_policy_predicts_what_the_policy_does(policy):
    before = predict(policy)
    with policy.reference():
        reference = predict(policy)
    with policy.merged():
        merged = predict(policy)
        calls = []
        for name, module in policy.network.module.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(lambda *_: calls.append(1))
        predict(policy)
    assert not calls
    torch.testing.assert_close(merged, before, atol=1e-4, rtol=1e-4)
    assert (merged - reference).abs().max() > 1e-3


def test_weights_and_what_trains_come_back_to_the_bit_even_after_an_exception(policy):
    weights = {name: weight.clone() for name, weight in policy.network.module.state_dict().items()}
    before, trained = predict(policy), policy.network.parameters()
    with pytest.raises(KeyboardInterrupt), policy.merged():
        raise KeyboardInterrupt
    assert all(torch.equal(weights[name], weight) for name, weight in policy.network.module.state_dict().items())
    assert torch.equal(predict(policy), before)
    assert [id(parameter) for parameter in policy.network.parameters()] == [id(parameter) for parameter in trained]


def test_the_reference_is_refused_while_merged(policy):
    with (
        policy.merged(),
        pytest.raises(RuntimeError, match="the adapter is merged into the weights"),
        policy.reference(),
    ):
        pass
    before = predict(policy)
    with policy.reference():
        reference = predict(policy)
        with policy.merged():
            assert torch.equal(predict(policy), reference)
        assert torch.equal(predict(policy), reference)
    assert torch.equal(predict(policy), before)


def test_half_precision_is_left_unmerged_for_it_would_round_the_adapter_away(family, tiny_folder):
    policy = make_tiny_denoiser(family, tiny_folder(family), dtype="bfloat16")
    add_lora(policy.network.module, LoraConfig(rank=2), seed=0)
    shake(policy, scale=1e-2)
    before = predict(policy)
    with policy.merged():
        assert torch.equal(predict(policy), before)


def test_without_an_adapter_there_is_nothing_to_merge(denoiser):
    with denoiser.merged():
        predict(denoiser)
