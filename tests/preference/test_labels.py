import math

import pytest
import torch

from spo.preference.labels import human_labels, pairwise_accuracy, prompt_weights, pseudo_labels

LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75], [0.5, 0.5]])
RIGHT = torch.tensor([[2.0, 1.0], [-1.0, 0.0], [3.0, 4.0], [9.0, 0.0]])


def test_human_labels_are_shares_and_equal_votes_a_tie():
    votes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.0, 1.0], [3.0, 1.0]])
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [0.75, 0.25]])
    assert torch.equal(human_labels(votes), expected)


@pytest.mark.parametrize("row", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 0.0]])
def test_a_row_without_a_vote_is_refused_by_its_number(row: list[float]):
    with pytest.raises(ValueError, match=r"labels\[1\]"):
        human_labels(torch.tensor([[1.0, 0.0], row]))


def test_pseudo_labels_follow_a_gap_above_the_margin_and_tie_below():
    gap = torch.tensor([0.3, -0.3, 0.09, -0.09, 0.0])  # of the softmax: tanh(half the difference of scores)
    scores = torch.stack([2 * torch.atanh(gap), torch.zeros(5)], dim=1)
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    assert torch.equal(pseudo_labels(scores, tie_margin=0.1), expected)


def test_pseudo_labels_swap_with_the_images_and_ignore_a_common_shift():
    scores = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    labels = pseudo_labels(scores, tie_margin=0.1)
    assert torch.equal(pseudo_labels(scores.flip(1), tie_margin=0.1), labels.flip(1))
    assert torch.equal(pseudo_labels(scores + 7, tie_margin=0.1), labels)
    assert torch.equal(labels.sum(dim=1), torch.ones(50))


def test_equal_scores_are_a_tie_without_a_margin_too():
    assert torch.equal(pseudo_labels(torch.ones(1, 2), tie_margin=0.0), torch.tensor([[0.5, 0.5]]))


def test_every_prompt_has_weight_one_over_all_its_examples():
    weights = prompt_weights(["a", "b", "a", "a", "b", "c"])
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 2, 1 / 3, 1 / 3, 1 / 2, 1]))


def test_ties_do_not_count():
    assert pairwise_accuracy(RIGHT, LABELS) == (1, 3)
    assert pairwise_accuracy(RIGHT.flip(1), LABELS) == (0, 3)


def test_a_model_without_opinion_has_one_half():
    assert pairwise_accuracy(torch.zeros(4, 2), LABELS)[0] == 0.5


def test_without_a_decided_pair_the_accuracy_is_nan():
    assert math.isnan(pairwise_accuracy(torch.ones(2, 2), torch.full((2, 2), 0.5))[0])


def test_shapes_of_scores_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must both be"):
        pairwise_accuracy(torch.ones(2), LABELS)
