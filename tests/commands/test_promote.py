"""The promotion gate against a real store: an evaluation made by hand, a real LoRA on a tiny random base."""

import json
import os
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from spo.commands import promote
from spo.config import Config, LoraConfig, ModelConfig, SamplerConfig, load_config
from spo.errors import ConfigError, DataError
from spo.models.lora import add_lora, save_lora
from spo.runtime.files import write_csv
from spo.tracking import registry
from spo.tracking.store import connect
from spo.workspace import Workspace
from tests.models.tiny import RESOLUTION, make_tiny_denoiser, make_tiny_pipeline, shake

ROOT = Path(__file__).parents[2]
SAMPLERS = {name: SamplerConfig(steps=2, eta=eta) for name, eta in (("ddim", 0.0), ("ddim-stochastic", 1.0))}
PROMPTS = ("a small red cross on a white background", "a large blue circle on a black background")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a base; its store is made once, which takes seconds."""
    folder = tmp_path_factory.mktemp("project")
    make_tiny_pipeline("sd15", folder / "model")
    return folder


@pytest.fixture
def config(request: pytest.FixtureRequest, root: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """One registered model a test."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("SPO_PIPELINE_RUN", "p1")
    base = load_config(ROOT, "tiny")
    evaluate = base.evaluate.model_copy(update={"samplers": SAMPLERS, "bootstrap_samples": 200, "batch_size": 4})
    model = ModelConfig(family="sd15", path="model", resolution=RESOLUTION)
    name = request.node.name.removeprefix("test_")[:40]
    values = {"profile": name, "model": model, "evaluate": evaluate, "methods": ("spo",)}
    return base.model_copy(update=values)


def write_evaluation(
    config: Config, root: Path, *, gain: float, fall: float = 0.0, seed: int, base: float = 0.5
) -> None:
    """What `evaluate` and `report` leave behind, for a LoRA of its own."""
    folder = Workspace(config, root).evaluate
    denoiser = make_tiny_denoiser("sd15", root / "model")
    add_lora(denoiser.network.module, LoraConfig(rank=2), seed=seed)
    shake(denoiser, seed=seed)
    save_lora(denoiser.network, folder / "lora" / "spo")
    rows = [
        {
            "column": column,
            "training_seed": training_seed,
            "sampler": sampler,
            "prompt_index": i,
            "image_index": 0,
            "prompt": prompt,
            "aesthetic": base + (gain + i / 1000 if column == "spo" else 0),
            "alignment": 0.9 - (fall if column == "spo" else 0),
        }
        for column, training_seed in (("base", ""), ("spo", 0))
        for sampler in config.evaluate.samplers
        for i, prompt in enumerate(PROMPTS)
    ]
    write_csv(folder / "scores.csv", rows)
    (folder / "metrics.json").write_text(
        json.dumps({"sampler": "ddim", "spo": {"released": f"seed-0/step-{seed:06d}"}})
    )
    report = Workspace(config, root).report
    report.mkdir(parents=True, exist_ok=True)
    (report / "summary.txt").write_text("spo raises aesthetic.\n")
    (report / "report.html").write_text("<html>")


def version(config: Config, number: int) -> mlflow.entities.model_registry.ModelVersion:
    return connect(Path()).get_model_version(registry.model_name(config), str(number))


def test_the_first_model_is_champion_only_if_it_beats_the_base(config: Config, root: Path) -> None:
    write_evaluation(config, root, gain=-0.1, seed=1)
    decision = promote.run(config)
    assert decision is not None
    assert not decision.promoted
    assert registry.champion(config) is None
    write_evaluation(config, root, gain=0.1, seed=2)
    decision = promote.run(config)
    assert decision is not None
    assert decision.promoted
    champion = registry.champion(config)
    assert champion is not None
    assert champion.number == 2


def test_a_challenger_meets_the_champion_and_the_reasons_stand_on_its_version(
    config: Config, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_evaluation(config, root, gain=0.1, seed=1)
    promote.register_released(config)
    promote.run(config)
    promote.run(config)
    assert "version 1 (spo) is the champion already" in capsys.readouterr().out
    write_evaluation(config, root, gain=0.3, fall=0.2, seed=2)
    promote.run(config)
    assert registry.champion(config).number == 1  # type: ignore[union-attr]
    loser = version(config, 2)
    assert loser.tags["promotion"] == "not promoted"
    assert loser.tags["promotion.against"] == "the champion, version 1 (spo)"
    assert loser.tags["promotion.reasons"].startswith(
        "alignment with ddim: -0.2000 [-0.2000, -0.2000] does not lie above"
    )
    assert "spo raises aesthetic." in loser.description
    assert "does not lie above" in loser.description
    write_evaluation(config, root, gain=0.2, seed=3)
    promote.run(config)
    assert registry.champion(config).number == 3  # type: ignore[union-attr]
    assert version(config, 3).tags["promotion"] == "promoted"
    assert version(config, 3).tags["evaluation.aesthetic.vs_base"] == "+0.2005"
    assert version(config, 3).tags["evaluation.sampler"] == "ddim (2 steps, guidance 5, eta 0)"


def test_a_champion_evaluated_under_other_conditions_is_evaluated_anew(
    config: Config, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_evaluation(config, root, gain=0.1, seed=1)
    promote.run(config)
    write_evaluation(config, root, gain=5.0, seed=2, base=0.6)  # better than any picture can be
    decision = promote.run(config)
    assert "the champion, was evaluated under other conditions; it is evaluated anew" in capsys.readouterr().out
    assert decision is not None
    assert decision.checks[0].found.difference > 4.5  # from the oracle's scores of random pictures, not from 0.6
    assert decision.rival == "the champion, version 1 (spo)"


def test_a_champion_whose_scores_were_kept_by_eta_is_evaluated_anew(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = Workspace(config, root).evaluate / "scores.csv"
    write_evaluation(config, root, gain=0.1, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(promote, "fingerprint", lambda base: "of a table with the column eta")
        released = promote.find_candidate(config, root)
        old = scores.read_text().replace(",sampler,", ",eta,").replace(",ddim-stochastic,", ",1.0,")
        scores.write_text(old.replace(",ddim,", ",0.0,"))
        registry.make_champion(promote.register(config, released, root), root)
    with pytest.raises(DataError, match="is of other samplers than the profile's; run `python -m spo evaluate` again"):
        promote.run(config)
    write_evaluation(config, root, gain=0.1, seed=2)
    assert promote.run(config) is not None
    assert "the champion, was evaluated under other conditions; it is evaluated anew" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_mlflow_loads_what_was_registered_and_paints_with_it(config: Config, root: Path) -> None:
    write_evaluation(config, root, gain=0.1, seed=1)
    promote.run(config)
    connect(root)
    mlflow.set_tracking_uri(f"sqlite:///{root.resolve() / 'mlflow' / 'mlflow.db'}")
    uri = f"models:/{registry.model_name(config)}@champion"
    pipeline = mlflow.diffusers.load_model(uri).load_pipeline(safety_checker=None)
    assert pipeline.get_active_adapters()
    files = {path.name for path in Path(mlflow.artifacts.download_artifacts(uri)).joinpath("evaluation").iterdir()}
    assert {"scores.csv", "metrics.json", "report.html", "summary.txt"} <= files
    picture = mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({"prompt": ["a small red cross"]}))[0]
    assert picture.startswith(b"\x89PNG")


def test_what_cannot_be_promoted_is_told(config: Config, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="run `python -m spo evaluate`"):
        promote.run(config)
    with pytest.raises(ConfigError, match=r"'dpo' is not among the evaluated methods; use one of \['spo'\]"):
        promote.run(config, method="dpo")
    promote.register_released(config)
    assert "warning: not registered: " in capsys.readouterr().err
    assert os.listdir(root / "mlflow")
