"""`python -m spo check` over projects of one's own: what it finds, and that it leaves nothing behind."""

import json
from pathlib import Path

import pytest
import yaml

from spo.__main__ import main
from spo.commands import miniature as check
from spo.commands.miniature import forwards, miniature
from spo.config import Config, PairConfig, load_config
from spo.errors import DataError
from spo.stages import prepare
from spo.tracking import NullTracker
from spo.workspace import Workspace
from tests.test_pipeline import make_project

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("check") / "project", "sd15")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_a_sound_project_goes_through_every_stage_in_miniature_and_is_left_as_it_was(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    before = names(project)
    assert main(["check"]) == 0
    assert names(project) == before
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok  ") for line in lines[:-1])
    found = [line[6:41].strip() for line in lines[:-1]]
    stages = ["prepare", "train_preference pixel", "align spo", "evaluate", "report"]
    assert [name for name in found if name.endswith("in miniature")] == [f"{stage} in miniature" for stage in stages]
    assert found[-2:] == ["time", "memory"]
    assert lines[-1] == "profile own can run"


def test_where_the_first_pairs_are_of_one_caption_all_are_read(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr(check, "PAIRS_READ", 1)
    config = load_config()
    small = miniature(config, project)
    with pytest.raises(DataError, match="none falls to"):
        prepare.run(small, root=tmp_path, tracker=NullTracker())
    check._prepare(small, config, tmp_path)
    metrics = json.loads((Workspace(small, tmp_path).prepared.folder / "metrics.json").read_text())["preferences"]
    assert metrics["train"] and metrics["validation"]


def with_setting(project: Path, section: str, **values: object) -> str:
    """The name of a profile that differs in a section's values."""
    config = yaml.safe_load((project / "configs" / "own.yaml").read_text())
    config[section] |= values
    (project / "configs" / "changed.yaml").write_text(yaml.safe_dump(config))
    return "changed"


def test_fewer_prompts_than_evaluation_asks_for_are_told_beforehand(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    asked = load_config().evaluate.num_prompts
    assert main(["check", "--quick"]) == 0
    assert "note:" not in capsys.readouterr().out
    profile = with_setting(project, "evaluate", num_prompts=1000)
    assert main(["check", "--quick", "--profile", profile]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "note:" in line]
    assert line.startswith("ok    evaluate.num_prompts ") and "fall to test, not 1000, and all of them" in line
    assert asked < 1000


def test_a_missing_file_is_found_before_anything_is_loaded(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    profile = with_setting(project, "prepare", prompts={"source": "no.txt"})
    assert main(["check", "--profile", profile]) == 1
    out = capsys.readouterr().out
    assert "FAIL  prepare.prompts.source             no.txt does not exist" in out
    assert "in miniature" not in out
    assert out.splitlines()[-1] == "profile changed cannot run yet: repair the lines marked FAIL"


@pytest.mark.slow
def test_a_mistake_that_only_a_run_shows_is_found_by_the_miniature(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    profile = with_setting(project, "model", resolution=17)
    assert main(["check", "--profile", profile]) == 1
    assert (
        "FAIL  train_preference pixel in miniature model.resolution=17 must be a multiple of" in capsys.readouterr().out
    )


@pytest.mark.parametrize("profile", [path.stem for path in sorted((ROOT / "configs").glob("*.yaml"))])
def test_every_profile_has_a_miniature_with_the_same_models_and_samplers(profile: str) -> None:
    config = load_config(ROOT, profile)
    small = miniature(config, ROOT)
    assert (small.model, small.sampling, small.methods) == (config.model, config.sampling, config.methods)
    assert all(model.steps == 1 for model in small.preference_models.values())
    for method in small.align.values():
        assert method.epochs == 1
        assert not isinstance(method, PairConfig) or method.rollouts_per_epoch == 1


def test_the_time_of_diffusion_dpo_is_told_from_the_pairs_there_are(tmp_path: Path) -> None:
    config = load_config(ROOT, "tiny").model_copy(update={"methods": ("diffusion_dpo",)})
    share = 1 - config.prepare.validation_fraction - config.prepare.test_fraction
    whole = forwards(config, ROOT, tmp_path)["align diffusion_dpo"]
    assert whole == pytest.approx(4 * config.align["diffusion_dpo"].epochs * 4608 * share)
    fewer = config.model_dump()
    fewer["prepare"]["preferences"]["max_pairs"] = 1000
    assert forwards(Config.model_validate(fewer), ROOT, tmp_path)["align diffusion_dpo"] < whole / 4


def test_the_miniature_has_as_many_pairs_at_a_time_as_the_training() -> None:
    """So that what does not fit into memory shows in the first minute."""
    sd15, tiny = (miniature(load_config(ROOT, profile), ROOT) for profile in ("sd15", "tiny"))
    assert sd15.preference_models["pixel"].batch_size == 16  # of batches of 64
    assert sd15.align["spo"].batch_size == 10  # of updates of 40 pairs
    assert tiny.align["diffusion_dpo"].batch_size == 32
    assert tiny.align["spo"].batch_size == 64  # the most that it tries, of 96
