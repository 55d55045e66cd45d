"""A stage that is stopped under DVC or under the Prefect flow goes on under it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock, Timeout

from tests.test_pipeline import make_project, spo

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not os.environ.get("SPO_SOAK"), reason="takes minutes; `make soak` runs it")

DVC = {
    "stages": {
        "train_preference": {
            "cmd": f"{sys.executable} -m spo train_preference pixel",
            "deps": ["runs/own/prepare/preferences"],
            "outs": ["runs/own/preference_models/pixel"],
            "metrics": [{"runs/own/train_preference/pixel/metrics.json": {"cache": False}}],
        }
    }
}


REPRO = ["-m", "dvc", "repro"]
FLOW = ["-m", "flows.full", "--stage", "train_preference"]


def start(command: list[str], root: Path, output: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "true"}
    environment |= {"PREFECT_HOME": str(root / ".prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("command", [REPRO, FLOW], ids=["dvc", "flow"])
def test_a_stage_that_was_stopped_goes_on(tmp_path: Path, command: list[str], number: signal.Signals) -> None:
    root = make_project(tmp_path / "project", "sd15")
    path = root / "configs" / "own.yaml"
    config = yaml.safe_load(path.read_text())
    config["safety"] = {"save_every_seconds": 0}
    config["preference_models"]["pixel"]["steps"] = 200
    path.write_text(yaml.safe_dump(config))
    (root / "dvc.yaml").write_text(yaml.safe_dump(DVC))
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=root, check=True)
    assert spo(root, ["prepare"]).returncode == 0
    states = root / ".cache" / "state" / "own" / "train_preference" / "pixel"
    with start(command, root, tmp_path / "first.txt") as first:
        while len(list(states.glob("0*"))) < 2:
            assert first.poll() is None, (tmp_path / "first.txt").read_text()
            time.sleep(0.1)
        os.killpg(first.pid, number)
    while _locked(root):
        time.sleep(0.1)
    with start(command, root, tmp_path / "second.txt") as second:
        assert second.wait() == 0, (tmp_path / "second.txt").read_text()
    assert "train_preference pixel: continues from step" in (tmp_path / "second.txt").read_text()
    assert (root / "runs/own/preference_models/pixel/model.safetensors").is_file()
    assert not list(states.glob("0*"))


def _locked(root: Path) -> bool:
    """Whether the stage that was told to end still holds its lock."""
    try:
        with FileLock(root / ".cache/locks/own/train_preference-pixel.lock", timeout=0):
            return False
    except Timeout:
        return True
