import math

import pytest
import torch

from spo.preference.accuracy import pairwise_accuracy

LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75], [0.5, 0.5]])
RIGHT = torch.tensor([[2.0, 1.0], [-1.0, 0.0], [3.0, 4.0], [9.0, 0.0]])


def test_ties_do_not_count():
    assert pairwise_accuracy(RIGHT, LABELS).accuracy == 1
    assert pairwise_accuracy(RIGHT.flip(1), LABELS).accuracy == 0
    assert pairwise_accuracy(RIGHT, LABELS).num_pairs == 3


def test_a_model_without_opinion_has_one_half():
    assert pairwise_accuracy(torch.zeros(4, 2), LABELS).accuracy == 0.5


def test_without_a_decided_pair_the_accuracy_is_nan():
    assert math.isnan(pairwise_accuracy(torch.ones(2, 2), torch.full((2, 2), 0.5)).accuracy)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must both be"):
        pairwise_accuracy(torch.ones(2), LABELS)
