from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spo.evaluation.promotion import Scored, decide, fingerprint, scored

SAMPLERS = ("ddim", "ancestral")
RNG = np.random.default_rng(0)
NOISE = {(sampler, i): RNG.normal(0, 0.01, 2) for sampler in SAMPLERS for i in range(60)}


def system(aesthetic: float, alignment: float, ancestral: float | None = None) -> Scored:
    """Scores of 60 prompts under two samplers, about 0.01 apart from one another."""
    return {
        (sampler, i, 0, f"prompt {i}"): {
            "aesthetic": aesthetic + NOISE[sampler, i][0] * (1 + aesthetic),
            "alignment": (alignment if sampler == "ddim" or ancestral is None else ancestral)
            + NOISE[sampler, i][1] * (1 + alignment),
        }
        for sampler in SAMPLERS
        for i in range(60)
    }


RIVAL = system(0.5, 0.9)


def decision(candidate: Scored, tolerance: float = 0.02) -> Any:
    rule = {"primary": "aesthetic", "tolerances": {"alignment": tolerance}, "deciding": "ddim", "samples": 500}
    return decide(candidate, RIVAL, name="the base", **rule)


def test_a_clear_gain_without_a_fall_is_promoted() -> None:
    found = decision(system(0.55, 0.9))
    assert found.promoted
    assert found.description == "promoted: it beats the base in aesthetic and falls in no guarded score"
    assert [(check.metric, check.sampler) for check in found.checks] == [
        ("aesthetic", "ddim"),
        ("alignment", "ddim"),
        ("alignment", "ancestral"),
    ]


def test_a_gain_whose_interval_reaches_zero_is_not_promoted() -> None:
    noisy = {
        image: {**scores, "aesthetic": scores["aesthetic"] + (0.2 if image[1] % 2 else -0.19)}
        for image, scores in RIVAL.items()
    }
    found = decision(noisy)
    assert found.checks[0].found.difference > 0
    assert not found.promoted
    assert "the interval of aesthetic" in found.description
    assert "does not lie above 0" in found.reasons[0]


def test_no_model_beats_itself() -> None:
    assert not decision(RIVAL).promoted


def test_a_fall_of_a_guarded_score_is_not_promoted_whatever_the_gain() -> None:
    found = decision(system(0.9, 0.87))
    assert not found.promoted
    assert found.reasons[0].startswith("alignment with ddim:")


def test_a_guarded_score_must_hold_under_every_sampler() -> None:
    found = decision(system(0.9, 0.9, ancestral=0.87))
    assert not found.promoted
    assert found.reasons[0].startswith("alignment with ancestral:")


def test_a_fall_within_the_tolerance_is_forgiven() -> None:
    assert decision(system(0.55, 0.87), tolerance=0.05).promoted
    assert not decision(system(0.55, 0.87), tolerance=0.01).promoted


def test_an_interval_that_only_touches_its_bound_does_not_pass() -> None:
    check = decision(system(0.55, 0.9)).checks[0]
    assert not replace(check, above=check.found.low).passed


def test_systems_of_other_images_are_not_compared() -> None:
    fewer = {image: scores for image, scores in RIVAL.items() if image[1] < 50}
    with pytest.raises(ValueError, match="share 100 images"):
        decision(fewer)


def test_a_fingerprint_changes_with_any_score_or_prompt() -> None:
    first, *rest = RIVAL.items()
    assert fingerprint(RIVAL) == fingerprint(dict(reversed(list(RIVAL.items()))))
    assert fingerprint(RIVAL) != fingerprint(dict(rest))
    assert fingerprint(RIVAL) != fingerprint({first[0]: {**first[1], "alignment": 0.0}, **dict(rest)})


def test_a_column_is_read_from_the_rows_of_a_table() -> None:
    row = {"training_seed": "0", "sampler": "ddim", "prompt_index": "2", "image_index": "0", "prompt": "a cross"}
    rows = [
        {"column": "spo", **row, "aesthetic": "0.5"},
        {"column": "spo", **row, "training_seed": "1", "aesthetic": "0.7"},
        {"column": "base", **row, "training_seed": "", "aesthetic": "0.4"},
    ]
    assert scored(rows, "spo", "0") == {("ddim", 2, 0, "a cross"): {"aesthetic": 0.5}}
    assert scored(rows, "base") == {("ddim", 2, 0, "a cross"): {"aesthetic": 0.4}}
