"""Agreement of a preference model with a metric on the best and worst candidate of one x_t."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.config import CandidatesConfig, SamplingConfig
from spo.core.types import Candidates
from spo.evaluation import candidate_agreement as module
from spo.evaluation.candidate_agreement import candidate_agreement
from spo.models.latent_diffusion import LatentDiffusion
from tests.models.tiny import make_tiny_denoiser, make_tiny_pipeline

PROMPTS = ["a cat", "a dog", "a hen"]
STEPS = 3


@pytest.fixture(scope="module", params=["sd15", "sd3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    path = make_tiny_pipeline(request.param, tmp_path_factory.mktemp("agreement") / "model")
    return make_tiny_denoiser(request.param, path, sampling=SamplingConfig(steps=STEPS))


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric: how bright an image is."""

    def measure(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        assert len(images) == len(prompts)
        return {"aesthetic": images.double().mean(dim=(1, 2, 3))}

    monkeypatch.setattr(module, "build_metrics", lambda *_, **__: [measure])


class Scorer:
    """Scores candidates by a function of them."""

    def __init__(self, score: Callable[[Candidates], Tensor]):
        self.score = score
        self.times: list[float] = []

    def encode(self, prompts: list[str]) -> Any:
        return None

    def __call__(self, candidates: Candidates) -> Tensor:
        self.times.append(candidates.t)
        return self.score(candidates)


def settings(**values: Any) -> CandidatesConfig:
    return CandidatesConfig(metric={"kind": "oracle"}, score="aesthetic", num_candidates=3, **values)


def of_images(candidates: Candidates) -> Tensor:
    return candidates.images.double().mean(dim=(2, 3, 4))


@pytest.mark.usefixtures("brightness")
def test_a_model_that_scores_as_the_metric_does_agrees_and_its_opposite_does_not(base: LatentDiffusion) -> None:
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        scorer = Scorer(lambda candidates, sign=sign: sign * of_images(candidates))
        rows = candidate_agreement(base, scorer, PROMPTS, settings(), seed=3)
        times = [*base.timesteps.tolist()[1:], 0][: base.num_trainable]  # a flow's last step draws no candidates
        assert [row["timestep"] for row in rows] == times == scorer.times
        assert [row["agreement"] for row in rows] == [expected] * base.num_trainable
        assert {(row["low"], row["high"], row["n"]) for row in rows} == {(expected, expected, len(PROMPTS))}


@pytest.mark.usefixtures("brightness")
def test_equal_candidates_count_half(base: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "score", lambda _, images, __: {"aesthetic": torch.ones(len(images))})
    rows = candidate_agreement(base, Scorer(of_images), PROMPTS, settings(), seed=3)
    assert [row["agreement"] for row in rows] == [0.5] * base.num_trainable


@pytest.mark.usefixtures("brightness")
def test_looking_ahead_measures_the_end_of_deterministic_sampling(base: LatentDiffusion) -> None:
    cond = base.encode(PROMPTS)

    def ahead(candidates: Candidates) -> Tensor:
        """What `look_ahead` should find, by the pipeline's own steps with eta 0."""
        x, k = candidates.x.flatten(0, 1), len(candidates.x)
        sampler, grid = replace(base.sampler, eta=0.0), [*base.timesteps.tolist(), 0]
        at = grid.index(candidates.t)
        for t, t_prev in zip(grid[at:], grid[at + 1 :], strict=False):
            now, then = (torch.full((len(x),), time) for time in (t, t_prev))
            x = sampler.transition(base.predict(x, now, cond.repeat(k)), x, now, then).mean
        return base.decode(x).double().mean(dim=(1, 2, 3)).unflatten(0, (k, -1))

    with torch.no_grad():
        rows = candidate_agreement(base, Scorer(ahead), PROMPTS, settings(look_ahead=True), seed=3)
        other = candidate_agreement(base, Scorer(ahead), PROMPTS, settings(), seed=3)
    assert [row["agreement"] for row in rows] == [1.0] * base.num_trainable
    assert other[-1]["agreement"] == 1.0  # at the end there is nothing ahead


def test_a_metric_without_weights_gives_no_rows(base: LatentDiffusion, tmp_path: Path) -> None:
    lacking = {"kind": "clip", "name": "theirs", "model": str(tmp_path / "nowhere")}
    config = CandidatesConfig(metric=lacking, score="theirs")
    assert candidate_agreement(base, Scorer(of_images), PROMPTS, config, seed=0) == []
