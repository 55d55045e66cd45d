"""Which pairs pass the filter of consistent pairs."""

import json
from pathlib import Path

import pytest
import torch

from spo.config import Config, PairFilter, load_config
from spo.core.types import LabelledPairs
from spo.errors import DataError
from spo.metrics import metric
from spo.preference.labels import prompt_weights
from spo.stages import prepare, train_preference
from spo.tracking import NullTracker
from spo.training import pair_filter
from spo.training.pair_filter import consistent, filter_pairs
from spo.workspace import Workspace
from tests.test_pipeline import make_project

ORACLE = ({"kind": "oracle"},)


def test_a_decided_pair_needs_every_gap_and_a_tie_small_ones() -> None:
    label = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    gaps = {
        "aesthetic": torch.tensor([-0.4, -0.6, -0.1, 0.6, 0.1, 0.3]),
        "alignment": torch.tensor([0.1, 0.2, -0.1, -0.2, 0.0, 0.0]),
    }
    settings = PairFilter(metrics=ORACLE, gaps={"aesthetic": -0.5, "alignment": 0.0}, ties={"aesthetic": 0.2})
    assert consistent(label, gaps, settings).tolist() == [True, False, True, False, True, False]
    without = PairFilter(metrics=ORACLE, gaps={"alignment": 0.0})
    assert consistent(label, gaps, without).tolist() == [True, True, True, True, True, True]
    strict = PairFilter(metrics=ORACLE, gaps={"alignment": 0.1})
    assert consistent(label, gaps, strict).tolist()[:4] == [False, True, False, True]  # above, not equal


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    root = make_project(tmp_path_factory.mktemp("filter") / "project", "sd15")
    config = load_config(root)
    source = config.prepare.prompts.model_copy(update={"source": str(root / "prompts.txt")})
    assert config.prepare.preferences is not None
    pairs = config.prepare.preferences.model_copy(update={"source": str(root / "pairs.parquet")})
    sections = {"prompts": source, "preferences": pairs}
    config = config.model_copy(
        update={
            "prepare": config.prepare.model_copy(update=sections),
            "model": config.model.model_copy(update={"path": str(root / "model")}),
        }
    )
    prepare.run(config, root=root, tracker=NullTracker())
    return config, root


def stored_pairs(config: Config, root: Path) -> tuple[LabelledPairs, Path]:
    path = Workspace(config, root).prepared.pairs_file("train")
    stored = pair_filter.PreferencePairs(path)
    label = torch.tensor(stored.labels)
    latents = torch.randn(len(label), 2, 4, 2, 2)
    return LabelledPairs.of(latents, label, prompt_weights(stored.captions), stored.captions), path


def middle_gap(config: Config, pairs: LabelledPairs, path: Path, cache: Path) -> float:
    """A gap that half of the pairs exceed."""
    settings = PairFilter(metrics=ORACLE, gaps={"aesthetic": 0.0})
    gaps = pair_filter._gaps(path, settings, config, torch.device("cpu"), cache=cache)["aesthetic"]
    return ((pairs.label[:, 0] - pairs.label[:, 1]).sign() * gaps).median().item()


def test_the_gaps_are_measured_once_and_the_counts_are_told(
    project: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, root = project
    pairs, path = stored_pairs(config, root)
    calls: list[int] = []
    score = metric.score

    def counted(metrics, images, prompts):  # type: ignore[no-untyped-def]
        calls.append(len(images))
        return score(metrics, images, prompts)

    monkeypatch.setattr(pair_filter, "score", counted)
    settings = PairFilter(metrics=ORACLE, gaps={"aesthetic": middle_gap(config, pairs, path, tmp_path / "other")})
    options = {"config": config, "device": torch.device("cpu"), "cache": tmp_path}
    calls.clear()
    kept, counts = filter_pairs(pairs, path, settings, **options)
    assert sum(calls) == 2 * len(pairs)
    assert len(kept) == counts["decided_kept"] + counts["ties_kept"] < len(pairs)
    assert counts["decided"] + counts["ties"] == len(pairs)
    assert f"keeps {counts['decided_kept']} of {counts['decided']} decided pairs" in capsys.readouterr().err
    assert torch.equal(kept.weight, prompt_weights(kept.captions))
    again, _ = filter_pairs(pairs, path, settings, **options)
    assert sum(calls) == 2 * len(pairs)
    assert torch.equal(again.members, kept.members)


def test_a_filter_that_no_decided_pair_passes_is_refused(project: tuple[Config, Path], tmp_path: Path) -> None:
    config, root = project
    pairs, path = stored_pairs(config, root)
    settings = PairFilter(metrics=ORACLE, gaps={"aesthetic": 5.0})
    with pytest.raises(DataError, match=r"no decided pair passes the filter with gaps .*; lower the gaps"):
        filter_pairs(pairs, path, settings, config, torch.device("cpu"), cache=tmp_path)


@pytest.mark.slow
def test_the_stage_reports_what_the_filter_kept(project: tuple[Config, Path], tmp_path: Path) -> None:
    config, root = project
    pairs, path = stored_pairs(config, root)
    settings = PairFilter(metrics=ORACLE, gaps={"aesthetic": middle_gap(config, pairs, path, tmp_path)})
    changes = {"filter": settings, "start_from": str(root / "clip"), "steps": 1, "candidates": None}
    model = config.preference_models["pixel"].model_copy(update=changes)
    config = config.model_copy(update={"preference_models": {"pixel": model}})
    train_preference.run(config, "pixel", root=root, tracker=NullTracker())
    workspace = Workspace(config, root)
    metrics = json.loads((workspace.train_preference("pixel") / "metrics.json").read_text())
    assert 0 < metrics["filter"]["decided_kept"] < metrics["filter"]["decided"]
