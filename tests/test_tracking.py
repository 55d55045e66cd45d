import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spo import tracking
from spo.config import Config, load_config
from spo.errors import ConfigError
from spo.tracking import NullTracker, Tracker

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose database is made once: that takes seconds."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture
def config(request: pytest.FixtureRequest) -> Config:
    """One experiment a test."""
    return load_config(ROOT, "tiny").model_copy(update={"profile": request.node.name})


@pytest.fixture(autouse=True)
def pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPO_PIPELINE_RUN", "p1")


def runs(root: Path, config: Config) -> dict[str, Any]:
    """All runs of the profile by name; the parent as "parent"."""
    client = tracking._client(root)
    experiment = client.get_experiment_by_name(f"spo-{config.profile}")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return {"parent" if "spo.pipeline" in run.data.tags else run.info.run_name: run for run in found}


def test_stages_of_a_pipeline_run_hang_under_one_parent(root: Path, config: Config) -> None:
    for stage, method in (("prepare", None), ("align", "spo")):
        with tracking.start(config, stage, root, method=method):
            pass
    found = runs(root, config)
    assert sorted(found) == ["align spo", "parent", "prepare"]
    for name in ("align spo", "prepare"):
        assert found[name].data.tags["mlflow.parentRunId"] == found["parent"].info.run_id
        assert found[name].info.status == "FINISHED"
    assert found["parent"].info.status == "FINISHED"


def test_another_pipeline_run_has_another_parent(root: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for pipeline, stage in (("p1", "prepare"), ("p2", "align"), ("p1", "report")):
        monkeypatch.setenv("SPO_PIPELINE_RUN", pipeline)
        with tracking.start(config, stage, root):
            pass
    found = runs(root, config)
    prepare, align, report = (found[name].data.tags["mlflow.parentRunId"] for name in ("prepare", "align", "report"))
    assert prepare == report
    assert prepare != align


def test_a_run_says_what_it_was_made_with(root: Path, config: Config) -> None:
    with tracking.start(config, "evaluate", root):
        pass
    tags = runs(root, config)["evaluate"].data.tags
    assert {"stage": "evaluate", "profile": config.profile}.items() <= tags.items()
    assert {"python", "torch", "diffusers", "hardware", "mlflow.source.git.commit"} <= tags.keys()


def test_what_is_logged_is_there_after_the_block(root: Path, config: Config, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<html>")
    with tracking.start(config, "align", root) as tracker:
        tracker.log_params({"seed": 3, "spo": {"beta": 10.0, "lora": {"rank": 8}}})
        for step in range(3):
            tracker.log_metrics({"loss": 0.7 - step / 10, "note": "no number", "eta_0": {"score@x": 1}}, step=step)
        tracker.log_image("samples", Image.new("RGB", (4, 4)))
        tracker.log_text("summary.txt", "SPO wins.")
        tracker.log_artifact(tmp_path / "page.html")
    run = runs(root, config)["align"]
    assert run.data.params == {"seed": "3", "spo.beta": "10.0", "spo.lora.rank": "8"}
    assert run.data.metrics == pytest.approx({"loss": 0.5, "eta_0.score_x": 1.0})
    client = tracking._client(root)
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [0, 1, 2]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"samples.png", "summary.txt", "page.html"}
    assert str(root / "mlflow" / "artifacts") in run.info.artifact_uri


def test_a_stage_that_raises_ends_failed_with_what_it_had_logged(root: Path, config: Config) -> None:
    with pytest.raises(KeyboardInterrupt), tracking.start(config, "align", root) as tracker:
        tracker.log_metrics({"loss": 1.0})
        raise KeyboardInterrupt
    found = runs(root, config)
    assert found["align"].info.status == found["parent"].info.status == "FAILED"
    assert found["align"].data.metrics == {"loss": 1.0}


def test_metrics_are_sent_in_batches(root: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.start(config, "align", root) as tracker:
        assert isinstance(tracker, tracking.MlflowTracker)
        sent: list[int] = []
        original = tracker._client.log_batch

        def log_batch(run_id: str, **what: Any) -> None:
            sent.append(len(what["metrics"]))
            original(run_id, **what)

        monkeypatch.setattr(tracker._client, "log_batch", log_batch)
        for step in range(1500):
            tracker.log_metrics({"loss": 1.0}, step=step)
        tracker.send()
    assert sum(sent) == 1500
    assert max(sent) <= 1000
    assert len(sent) <= 5


def test_a_store_that_fails_while_a_stage_runs_is_told_once_and_does_not_end_it(
    root: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk is full")

    with tracking.start(config, "align", root) as tracker:
        assert isinstance(tracker, tracking.MlflowTracker)
        monkeypatch.setattr(tracker._client, "log_batch", fail)
        tracker.log_params({"seed": 1})
        tracker.log_params({"seed": 1})
    assert capsys.readouterr().err == "warning: tracking lost something: disk is full\n"


def test_a_store_that_cannot_be_used_is_told_in_one_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nosuch://place")
    with pytest.raises(ConfigError, match=r"cannot track at nosuch://place: .*MLFLOW_TRACKING_URI") as caught:
        with tracking.start(config, "align", tmp_path):
            pass
    assert "\n" not in str(caught.value)


def test_of_a_distributed_run_the_first_process_alone_reports(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with tracking.start(config, "align", tmp_path) as tracker:
        tracker.log_metrics({"loss": 1.0})
    assert isinstance(tracker, NullTracker)
    assert not (tmp_path / "mlflow").exists()


def test_the_null_tracker_takes_everything(tmp_path: Path) -> None:
    tracker: Tracker = NullTracker()
    tracker.log_params({"a": 1})
    tracker.log_metrics({"a": 1}, step=2)
    tracker.log_image("a", Image.new("RGB", (1, 1)))
    tracker.log_text("a.txt", "a")
    tracker.log_artifact(tmp_path)


def test_commands_of_one_shell_share_a_pipeline_and_another_shell_has_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SPO_PIPELINE_RUN")
    line = f"{sys.executable} -c 'from spo.tracking import pipeline_id; print(pipeline_id())'"
    shells = [
        subprocess.run(["bash", "-c", f"{line}; {line}; true"], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (shell.stdout.split() for shell in shells)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0] != second[0]


@pytest.mark.slow
def test_stages_that_start_at_once_make_one_database_and_one_parent(config: Config, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from spo import tracking; from spo.config import load_config\n"
        "config = load_config(Path(sys.argv[1]), 'tiny')\n"
        "with tracking.start(config, 'align', Path(sys.argv[2]), method=sys.argv[3]): pass"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(ROOT), str(tmp_path), name]) for name in ("a", "b", "c")
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    found = runs(tmp_path, config.model_copy(update={"profile": "tiny"}))
    assert sorted(found) == ["align a", "align b", "align c", "parent"]
