"""Every shipped profile as DVC sees it."""

import shutil
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from spo.config import load_config

ROOT = Path(__file__).parents[1]
PROFILES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within DVC
@pytest.mark.parametrize("profile", PROFILES)
def test_dvc_would_run_every_stage_of_the_profile(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dvc repro --dry --force`: without --force DVC looks for what the first stages have yet to write."""
    for name in ("dvc.yaml", "configs"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    shared = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**shared, "profile": profile}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with Repo.init(no_scm=True) as repo:
        ran = [stage.name for stage in repo.reproduce(dry=True, force=True)]
    config = load_config(tmp_path)
    trained = [f"train_preference@{name}" for name in config.train_preference]
    aligned = [f"align@{name}-{seed}" for name in config.methods for seed in config.training_seeds]
    assert ran == ["pretrain", "prepare", *trained, *aligned, "evaluate", "report"]
    for stage in repo_stages(profile):
        assert f"runs/{profile}/" in stage


def repo_stages(profile: str) -> list[str]:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8").replace("${profile}", profile)
    return [yaml.safe_dump(stage) for name, stage in yaml.safe_load(text)["stages"].items() if name != "pretrain"]
