"""What `dvc metrics` and `dvc plots` show of a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.delivery.conftest import shell

pytestmark = pytest.mark.slow  # all use `ran`
EVALUATION = "runs/tiny/evaluate/metrics.json"


def shown(line: str, project: Path) -> dict[str, Any]:
    return json.loads(shell(f"{line} 2>/dev/null", project))


def test_metrics_have_every_stage_and_a_change_shows_as_a_difference(ran: Path, tmp_path: Path) -> None:
    found = shown("dvc metrics show --json", ran)[""]["data"]
    stages = ("prepare", "train_preference/pixel", "align/spo/seed-0", "evaluate")
    assert {f"runs/tiny/{stage}/metrics.json" for stage in stages} <= set(found)
    before = found[EVALUATION]["data"]["spo"]["aesthetic"]
    assert 0 <= before <= 1

    project = tmp_path / "project"
    shutil.copytree(ran, project, symlinks=True)
    assert shown("dvc metrics diff --json", project) == {}
    values = json.loads((project / EVALUATION).read_text())
    values["spo"]["aesthetic"] = before + 0.25
    (project / EVALUATION).write_text(json.dumps(values))
    [(name, change)] = shown("dvc metrics diff --json", project)[EVALUATION].items()
    assert name == "spo.aesthetic"
    assert change["diff"] == pytest.approx(0.25)


def test_plots_are_drawn_of_the_preference_model_and_the_training(ran: Path, tmp_path: Path) -> None:
    shell(f"dvc plots show -o {tmp_path / 'plots'}", ran)
    page = (tmp_path / "plots" / "index.html").read_text()
    preference = "train_preference/pixel"
    for name in (f"{preference}/accuracy.csv", f"{preference}/history.csv", "align/spo/seed-0/history.csv"):
        assert f"runs/tiny/{name}" in page
    assert shell("git status --porcelain", ran) == ""
