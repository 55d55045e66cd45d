import math

import pytest
import torch

from spo.core.losses import dpo_loss, log_ratio, preference_loss


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_is_log_2_where_the_policy_is_the_reference():
    log_p = randn(7, 2)
    loss = dpo_loss(log_ratio(log_p, log_p, clip_range=0.1), beta=10.0)
    torch.testing.assert_close(loss.value, torch.tensor(math.log(2), dtype=torch.float64))
    assert loss.metrics["logit"] == 0


def test_swapping_win_and_lose_negates_the_logit():
    ratio = randn(7, 2)
    plain, swapped = dpo_loss(ratio, beta=10.0), dpo_loss(ratio.flip(1), beta=10.0)
    torch.testing.assert_close(swapped.metrics["logit"], -plain.metrics["logit"])
    torch.testing.assert_close(swapped.metrics["accuracy"], 1 - plain.metrics["accuracy"].double(), check_dtype=False)
    torch.testing.assert_close(swapped.value, plain.value + plain.metrics["logit"])  # -log s(-z) = -log s(z) + z


def test_the_loss_inverts_to_the_logit():
    ratio = randn(1, 2)
    loss = dpo_loss(ratio, beta=3.0)
    torch.testing.assert_close(-loss.value.expm1().log(), loss.metrics["logit"])  # value = log(1 + exp(-logit))
    torch.testing.assert_close(loss.metrics["logit"], 3.0 * (ratio[0, 0] - ratio[0, 1]))


def test_the_loss_falls_as_the_win_becomes_likelier():
    log_p = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    dpo_loss(log_ratio(log_p, torch.zeros_like(log_p), clip_range=0.1), beta=10.0).value.backward()
    assert (log_p.grad[:, 0] < 0).all()
    assert (log_p.grad[:, 1] > 0).all()


def test_metrics_are_detached():
    ratio = randn(3, 2).requires_grad_()
    loss = dpo_loss(ratio, beta=10.0)
    assert loss.value.requires_grad
    assert not any(metric.requires_grad for metric in loss.metrics.values())


def test_a_wrong_pair_of_great_weight_keeps_loss_and_gradient_finite():
    ratio = torch.tensor([[-100.0, 100.0]], requires_grad=True)
    loss = dpo_loss(ratio, beta=10.0)
    loss.value.backward()
    assert loss.value == 2000
    assert torch.equal(ratio.grad, torch.tensor([[-10.0, 10.0]]))


def test_clipping_clamps_the_ratio_and_stops_its_gradient_as_published():
    values = torch.tensor([-0.5, -0.105, -0.05, 0.0, 0.05, 0.095, 0.5], dtype=torch.float64)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    clipped = log_ratio(ours, torch.zeros_like(ours), clip_range=0.1)
    published = theirs.exp().clamp(0.9, 1.1).log()
    torch.testing.assert_close(clipped, published)
    assert ((clipped.exp() > 0.9 - 1e-12) & (clipped.exp() < 1.1 + 1e-12)).all()
    clipped.sum().backward()
    published.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_without_clipping_the_log_ratio_is_the_difference():
    log_p, log_p_ref = randn(7, 2), randn(7, 2, seed=1)
    assert torch.equal(log_ratio(log_p, log_p_ref), log_p - log_p_ref)


def test_losses_are_float32_for_half_precision():
    half = randn(3, 2).bfloat16()
    label, weight = torch.tensor([[1.0, 0.0]] * 3), torch.ones(3)
    assert log_ratio(half, half).dtype == torch.float32
    assert dpo_loss(half, beta=10.0).value.dtype == torch.float32
    assert preference_loss(half, label.bfloat16(), weight.bfloat16()).value.dtype == torch.float32


def test_preference_loss_is_the_cross_entropy_of_a_clear_label():
    scores, label = randn(9, 2), torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 4, dtype=torch.float64)
    theirs = torch.nn.functional.cross_entropy(scores, label.argmax(dim=1))
    torch.testing.assert_close(preference_loss(scores, label, torch.ones(9)).value, theirs)


def test_preference_loss_is_0_for_a_tie_of_equal_scores_and_more_for_unequal_ones():
    tie, weight = torch.full((1, 2), 0.5, dtype=torch.float64), torch.ones(1)
    equal = preference_loss(torch.full((1, 2), 3.0, dtype=torch.float64), tie, weight)
    assert equal.value.abs() < 1e-12
    assert equal.metrics["accuracy"] == 0.5
    assert preference_loss(torch.tensor([[3.0, 3.1]], dtype=torch.float64), tie, weight).value > 1e-4


def test_preference_loss_is_blind_to_the_order_of_the_two_images():
    scores, label, weight = randn(9, 2), randn(9, 2, seed=1).softmax(dim=1), randn(9, seed=2).abs()
    swapped = preference_loss(scores.flip(1), label.flip(1), weight)
    plain = preference_loss(scores, label, weight)
    torch.testing.assert_close(swapped.value, plain.value)
    torch.testing.assert_close(swapped.metrics, plain.metrics)


def test_only_the_proportions_of_the_weights_count():
    scores, label, weight = randn(9, 2), randn(9, 2, seed=1).softmax(dim=1), randn(9, seed=2).abs()
    weighted = preference_loss(scores, label, weight)
    torch.testing.assert_close(preference_loss(scores, label, 7 * weight).value, weighted.value)
    assert preference_loss(scores, label, torch.ones(9)).value != weighted.value


def test_an_example_of_weight_2_counts_as_two():
    scores, label = randn(3, 2), randn(3, 2, seed=1).softmax(dim=1)
    doubled = preference_loss(scores[[0, 1, 2, 2]], label[[0, 1, 2, 2]], torch.ones(4))
    weighted = preference_loss(scores, label, torch.tensor([1.0, 1.0, 2.0]))
    torch.testing.assert_close(weighted.value, doubled.value)
    torch.testing.assert_close(weighted.metrics, doubled.metrics)


def test_accuracy_is_1_where_every_preferred_image_scores_higher():
    label = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    scores = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert preference_loss(scores, label, torch.ones(2)).metrics["accuracy"] == 1
    assert preference_loss(-scores, label, torch.ones(2)).metrics["accuracy"] == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"clip_range=1.1 must lie in \(0, 1\)"):
        log_ratio(randn(3, 2), randn(3, 2), clip_range=1.1)
    with pytest.raises(ValueError, match="a loss over 0 pairs has no value"):
        dpo_loss(randn(0, 2), beta=10.0)
    with pytest.raises(ValueError, match="weights of 3 examples sum to 0"):
        preference_loss(randn(3, 2), randn(3, 2).softmax(dim=1), torch.zeros(3))
