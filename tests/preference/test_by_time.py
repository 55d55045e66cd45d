from typing import Any

import pytest
import torch

from spo.core.types import Candidates
from spo.preference.by_time import ByTime


class Named:
    """A scorer that scores 1 for its own text, and notes the times that it saw."""

    def __init__(self, name: str):
        self.name = name
        self.seen: list[float] = []

    def encode(self, prompts: list[str]) -> list[str]:
        return [f"{self.name}: {prompt}" for prompt in prompts]

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        self.seen.append(candidates.t)
        own = [float(text.startswith(self.name)) for text in candidates.text]
        return torch.tensor([own] * len(candidates.x))


def candidates(t: float, text: Any, predicted: list[int]) -> Candidates:
    def predict_x_0() -> torch.Tensor:
        predicted.append(1)
        return torch.zeros(3, 2, 4, 2, 2)

    x = torch.zeros(3, 2, 4, 2, 2)
    return Candidates(x, t, text, predict_x_0=predict_x_0, decode=lambda latents: latents, t_from=t + 100)


def test_each_model_scores_its_times_with_its_own_text() -> None:
    early, late = Named("early"), Named("late")
    scorer = ByTime(early, late, at_most=201)
    text = scorer.encode(["a", "b"])
    for t in (601, 202, 201, 0):
        assert torch.equal(scorer(candidates(t, text, [])), torch.ones(3, 2))
    assert (early.seen, late.seen) == ([601, 202], [201, 0])


def test_nothing_is_predicted_unless_the_model_reads_it() -> None:
    predicted: list[int] = []
    shown = candidates(601, ("early", "late"), predicted)
    other = shown.with_text("own")
    assert (shown.text, other.text) == (("early", "late"), "own")
    assert (other.t, other.t_from) == (601, 701) and other.x is shown.x
    assert predicted == []
    assert other.images.shape == (3, 2, 4, 2, 2)
    assert predicted == [1]


@pytest.mark.parametrize("t", [900, 0])
def test_the_texts_of_both_are_encoded_once(t: float) -> None:
    scorer = ByTime(Named("early"), Named("late"), at_most=250)
    assert scorer.encode(["a"]) == (["early: a"], ["late: a"])
    assert scorer(candidates(t, scorer.encode(["a", "b"]), [])).shape == (3, 2)
