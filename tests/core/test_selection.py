import pytest
import torch

from spo.core.selection import select_pairs, take


def scores_of(k, b, seed=0):
    return torch.randn(k, b, generator=torch.Generator().manual_seed(seed))


def test_win_is_the_best_and_lose_the_worst_candidate():
    scores = scores_of(5, 40)
    selection = select_pairs(scores, threshold=0.3)
    assert torch.equal(take(scores, selection.win), scores.max(dim=0).values)
    assert torch.equal(take(scores, selection.lose), scores.min(dim=0).values)


def test_margin_is_the_difference_of_the_softmax():
    scores = scores_of(5, 40).double()
    selection = select_pairs(scores, threshold=0.3)
    both = torch.stack([take(scores, selection.win), take(scores, selection.lose)])
    probability = both.softmax(dim=0)
    torch.testing.assert_close(selection.margin, probability[0] - probability[1])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
def test_a_pair_is_kept_iff_its_margin_exceeds_the_threshold(threshold):
    selection = select_pairs(scores_of(4, 100), threshold=threshold)
    assert torch.equal(selection.keep, selection.margin > threshold)
    assert selection.keep.any()
    assert ((selection.margin >= 0) & (selection.margin < 1)).all()


def test_selection_is_permutation_equivariant_over_candidates():
    scores, order = scores_of(6, 30), torch.randperm(6, generator=torch.Generator().manual_seed(1))
    plain, shuffled = select_pairs(scores, threshold=0.3), select_pairs(scores[order], threshold=0.3)
    assert torch.equal(order[shuffled.win], plain.win)
    assert torch.equal(order[shuffled.lose], plain.lose)
    assert torch.equal(shuffled.margin, plain.margin)


def test_selection_is_permutation_equivariant_over_prompts():
    scores, order = scores_of(6, 30), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    plain, shuffled = select_pairs(scores, threshold=0.3), select_pairs(scores[:, order], threshold=0.3)
    assert torch.equal(shuffled.win, plain.win[order])
    assert torch.equal(shuffled.keep, plain.keep[order])


def test_selection_ignores_what_all_scores_of_a_prompt_share():
    scores = scores_of(4, 30).double()
    moved = select_pairs(scores + torch.arange(30), threshold=0.3)
    torch.testing.assert_close(moved.margin, select_pairs(scores, threshold=0.3).margin)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_scores_that_tell_nothing_are_not_kept(value):
    assert not select_pairs(torch.full((4, 3), value), threshold=0.0).keep.any()


def test_take_picks_one_candidate_for_each_prompt():
    x = torch.arange(3 * 4 * 2).view(3, 4, 2)
    taken = take(x, torch.tensor([2, 0, 1, 2]))
    assert torch.equal(taken, torch.stack([x[2, 0], x[0, 1], x[1, 2], x[2, 3]]))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"scores have shape \(1, 3\); use \(k, b\) with at least k = 2"):
        select_pairs(scores_of(1, 3), threshold=0.3)
    with pytest.raises(ValueError, match=r"threshold=30 must lie in \[0, 1\]"):
        select_pairs(scores_of(4, 3), threshold=30)
