"""Items of a stage side by side, with real DVC in a small project."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from spo.commands.side_by_side import environment_of, fitting_jobs, items_of, run_side_by_side
from spo.config import Config, load_config
from spo.runtime.processes import child_environment

ROOT = Path(__file__).parents[2]
MEET = """
import pathlib, sys, time
own, other = sys.argv[1:]
pathlib.Path(own + ".here").write_text("")
end = time.monotonic() + 120
while not pathlib.Path(other + ".here").exists():
    assert time.monotonic() < end, "the other item has not started"
    time.sleep(0.02)
pathlib.Path(own).write_text(own)
print("made", own)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of git and DVC with the stage `meet`, each item of which waits for the other one to start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meet.py").write_text(MEET)
    others = {"a": "b", "b": "a"}
    stages = {
        "meet": {"foreach": others, "do": {"cmd": f"{sys.executable} meet.py ${{key}} ${{item}}", "outs": ["${key}"]}},
        "fail": {"cmd": f"{sys.executable} -c 'raise SystemExit(3)'", "outs": ["never"]},
        "sleep": {"cmd": f"{sys.executable} -c 'import time; print(1); time.sleep(300)'", "outs": ["slept"]},
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, check=True)
    return tmp_path


def run(items: list[str], *, jobs: int = 2, force: bool = False) -> int:
    return run_side_by_side(items, jobs=jobs, environment=child_environment(), force=force)


def test_items_run_at_the_same_time_and_all_are_recorded(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["meet@a", "meet@b"]) == 0  # one after the other, neither would end
    assert set(yaml.safe_load((project / "dvc.lock").read_text())["stages"]) == {"meet@a", "meet@b"}
    shown = capfd.readouterr().out.splitlines()
    assert "meet@a | made a" in shown and "meet@b | made b" in shown
    assert run(["meet@a", "meet@b"], jobs=1) == 0
    assert sum("didn't change" in line for line in capfd.readouterr().out.splitlines()) == 2
    assert run(["meet@a", "meet@b"], force=True) == 0
    assert sum("made" in line for line in capfd.readouterr().out.splitlines()) == 2


def test_after_a_failed_item_the_one_beside_it_is_completed_and_no_other_starts(project: Path) -> None:
    (project / "b.here").write_text("")
    assert run(["fail", "meet@a"]) != 0
    assert (project / "a").exists()
    assert run(["fail", "meet@b"], jobs=1) != 0
    assert not (project / "b").exists()


def test_a_stop_ends_all_items(project: Path) -> None:
    code = "from tests.commands.test_side_by_side import run; run(['sleep', 'meet@a'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "sleep | 1":
        assert process.poll() is None
    while not (project / "a.here").exists():
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 4
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert alive == [] and len(gone) == len(children)


def test_items_share_the_cores_and_evaluate_takes_processes_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert environment_of(["prepare"], jobs=4) == {}
    assert environment_of(["align@a-0", "align@b-0"], jobs=4) == {"OMP_NUM_THREADS": "4"}
    assert environment_of(["evaluate"], jobs=4) == {"OMP_NUM_THREADS": "2", "SPO_PROCESSES": "4"}
    config = load_config(ROOT)
    monkeypatch.chdir(ROOT)
    assert fitting_jobs(config) == 4
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert fitting_jobs(config) == 2
    several = config.model_copy(update={"launch": config.launch.model_copy(update={"num_processes": 2})})
    assert fitting_jobs(several) == 1
    hub = config.model_copy(update={"model": config.model.model_copy(update={"path": "a/large-model"})})
    assert fitting_jobs(hub) == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert fitting_jobs(config) == 1
    assert environment_of(["evaluate"], jobs=2) == {}


def test_items_are_those_of_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Config = load_config(ROOT).model_copy(update={"training_seeds": (0, 1)})
    assert items_of(config) == [
        ["prepare"],
        ["train_preference@pixel", "train_preference@latent"],
        [f"align@{name}-{seed}" for name in ("spo", "lpo", "diffusion_dpo") for seed in (0, 1)],
        ["evaluate"],
        ["report"],
    ]
    monkeypatch.chdir(ROOT)
    listed = subprocess.run([sys.executable, "-m", "dvc", "stage", "list"], capture_output=True, text=True, check=True)
    names = {line.split()[0] for line in listed.stdout.splitlines()}
    assert {item for items in items_of(load_config(ROOT)) for item in items} <= names
