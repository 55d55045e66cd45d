"""A stage that is killed and run again ends as one that was left alone: to the bit, without gap or duplicate."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_pipeline import make_project

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("SPO_KILLS", "6"))  # of each stage: each moment with each signal; `make soak` asks for more
STEPS = KILLS * 3  # a killed run gets on by about two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `alone` and `killed`, in which the same stages ran; every step's state is saved."""
    root = make_project(tmp_path_factory.mktemp("resume") / "project", "sd15")
    path = root / "configs" / "own.yaml"
    config = yaml.safe_load(path.read_text())
    config["safety"] = {"save_every_seconds": 0}
    config["preference_models"]["pixel"] |= {"steps": STEPS, "evaluate_timesteps": [1], "evaluate_pairs": 4}
    config["align"]["spo"] |= {"epochs": STEPS // 2, "rollouts_per_epoch": 2, "prompts_per_rollout": 2}
    watch = {"every": 7, "num_prompts": 2, "metric": {"kind": "oracle"}, "score": "aesthetic"}
    config["align"]["spo"] |= {"watch": watch}
    config["align"]["diffusion_dpo"] = {
        "method": "diffusion_dpo", "epochs": STEPS, "updates_per_epoch": 1, "batch_size": 4, "beta": 100.0,
        "lora": {"rank": 2}, "watch": watch,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "stages" / "killed.py", root, str(KILLS), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    said = [path.read_text()[-2000:] for path in root.rglob("output.txt")]
    assert done.returncode == 0, "\n".join([done.stderr[-2000:], *said])
    (root / "outcomes.json").write_text(done.stdout.splitlines()[-1])
    return root


def assert_killed_in_many_ways(project: Path, stage: str) -> None:
    """In and out of saving, by SIGKILL and by SIGTERM; and the last run came to its end."""
    outcomes = json.loads((project / "outcomes.json").read_text())[stage]
    killed = [outcome for outcome in outcomes if outcome["code"]]
    assert outcomes[-1]["code"] == 0
    assert len(killed) == KILLS
    assert {outcome["code"] for outcome in killed} == {-signal.SIGKILL, 128 + signal.SIGTERM}
    assert {outcome["where"] for outcome in killed} >= {"saving", "training"}


def files(folder: Path) -> Iterator[Path]:
    return (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(path: Path) -> Any:
    """A file's bytes; of JSON and CSV all but the columns that tell the time."""
    match path.suffix:
        case ".json":
            return without_times(json.loads(path.read_text()))
        case ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                return without_times(list(csv.DictReader(file)))
    return path.read_bytes()


def assert_same(project: Path, stage: Path) -> None:
    one, other = project / "alone" / stage, project / "killed" / stage
    assert list(files(one)) == list(files(other))
    for name in files(one):
        assert contents(one / name) == contents(other / name), name


def test_a_preference_model_killed_at_random_moments_is_that_of_a_run_left_alone(project: Path) -> None:
    assert_killed_in_many_ways(project, "train_preference pixel")
    stage = Path("runs/own/train_preference/pixel")
    assert [int(row["step"]) for row in contents(project / "killed" / stage / "history.csv")] == [*range(1, STEPS + 1)]
    assert_same(project, stage)
    assert_same(project, Path("runs/own/preference_models/pixel"))


@pytest.mark.parametrize("method", ["spo", "diffusion_dpo"])
def test_a_policy_killed_at_random_moments_is_that_of_a_run_left_alone(project: Path, method: str) -> None:
    assert_killed_in_many_ways(project, f"align {method}")
    stage = Path("runs/own/align") / method / "seed-0"
    history = contents(project / "killed" / stage / "history.csv")
    assert [int(row["update"]) for row in history] == [*range(1, len(history) + 1)]
    assert {int(row["round"]) for row in history} == {*range(1, STEPS + 1)}
    assert_same(project, stage)


def test_a_run_that_came_to_its_end_leaves_nothing_but_its_outputs(project: Path) -> None:
    assert not [path for path in (project / "killed/runs").rglob(".*") if path.name != ".gitignore"]
    assert not [path for path in (project / "killed/.cache/state").rglob("*") if path.is_file()]
