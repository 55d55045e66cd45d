import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INVALID_PARAMETER_VALUE
from PIL import Image

from spo import tracking
from spo.commands.headline import show_results
from spo.config import Config, load_config
from spo.errors import ConfigError
from spo.pipeline import STAGES
from spo.runtime.files import write_json
from spo.tracking import NullTracker, Tracker, heartbeat
from spo.tracking.journal import Journal, unsent
from spo.tracking.sender import Sender
from spo.tracking.store import connect, note_ui, run_url
from spo.tracking.tracker import JournalTracker
from spo.workspace import Workspace

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
    client = connect(root)
    experiment = client.get_experiment_by_name(f"spo-{config.profile}")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return {"parent" if "spo.pipeline" in run.data.tags else run.info.run_name: run for run in found}


def test_stages_of_a_pipeline_run_hang_under_one_parent(root: Path, config: Config) -> None:
    for stage, method in (("prepare", None), ("align", "spo")):
        with tracking.start(config, stage, root, name=method):
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


def test_a_run_says_what_it_was_made_with(root: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "dvc.lock").write_text("schema: '2.0'\n")
    monkeypatch.setenv("SPO_FLOW_RUN", "f1")
    with tracking.start(config, "evaluate", root):
        pass
    tags = runs(root, config)["evaluate"].data.tags
    assert {"stage": "evaluate", "profile": config.profile}.items() <= tags.items()
    assert {"python", "torch", "diffusers", "processor", "mlflow.source.git.commit", "git.changed"} <= tags.keys()
    assert tags["dvc.lock"] == hashlib.sha256(b"schema: '2.0'\n").hexdigest()[:32]
    assert tags["prefect.flow_run_id"] == "f1"


def test_a_run_names_its_data_with_the_hash_of_what_it_holds(root: Path, config: Config) -> None:
    prepared = Workspace(config, root).prepared.folder / "prompts"
    prepared.mkdir(parents=True)
    (prepared / "test.txt").write_text("a small red cross\n")
    (prepared / "validation.txt").write_text("a large blue square\n")
    with tracking.start(config, "evaluate", root):
        pass
    inputs = {each.dataset.name: each for each in runs(root, config)["evaluate"].inputs.dataset_inputs}
    assert sorted(inputs) == ["prompts test", "prompts validation"]
    assert inputs["prompts test"].dataset.digest == hashlib.sha256(b"a small red cross\n").hexdigest()[:32]
    assert inputs["prompts test"].tags[0].value == "testing"


def test_data_that_another_run_names_at_the_same_moment_is_named(
    root: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow looks for a data set and then adds it; if another run is faster, its database refuses the second one."""
    prompts = Workspace(config, root).prepared.prompts_file("test")
    prompts.parent.mkdir(parents=True)
    prompts.write_text("a small red cross\n")
    refusals = [MlflowException("UNIQUE constraint failed: datasets.digest", BAD_REQUEST)]
    log_inputs = MlflowClient.log_inputs

    def racing(self: MlflowClient, *arguments: Any) -> None:
        if refusals:
            raise refusals.pop()
        log_inputs(self, *arguments)

    monkeypatch.setattr(MlflowClient, "log_inputs", racing)
    with tracking.start(config, "evaluate", root):
        pass
    inputs = runs(root, config)["evaluate"].inputs.dataset_inputs
    assert [each.dataset.name for each in inputs] == ["prompts test"]
    assert "lost something" not in capsys.readouterr().err


def test_what_is_logged_is_there_after_the_block(root: Path, config: Config, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<html>")
    with tracking.start(config, "align", root) as tracker:
        tracker.log_params({"seed": 3, "spo": {"beta": 10.0, "lora": {"rank": 8}}})
        for step in range(3):
            tracker.log_metrics(
                {"loss": 0.7 - step / 10, "note": "none", "list": ["a"], "eta_0": {"score@x": 1}}, step=step
            )
        tracker.log_image("samples", Image.new("RGB", (4, 4)))
        tracker.log_text("summary.txt", "SPO wins.")
        tracker.log_artifact(tmp_path / "page.html")
    run = runs(root, config)["align"]
    assert run.data.params == {"seed": "3", "spo.beta": "10.0", "spo.lora.rank": "8"}
    metrics = {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")}
    assert metrics == pytest.approx({"loss": 0.5, "eta_0.score_x": 1.0})
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
    client = connect(root)
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [0, 1, 2]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"samples.png", "summary.txt", "page.html"}
    assert str(root / "mlflow" / "artifacts") in run.info.artifact_uri


def test_a_stage_that_raises_ends_failed_with_what_it_had_logged(root: Path, config: Config) -> None:
    with pytest.raises(KeyboardInterrupt), tracking.start(config, "align", root) as tracker:
        tracker.log_metrics({"loss": 1.0})
        raise KeyboardInterrupt
    found = runs(root, config)
    assert found["align"].info.status == found["parent"].info.status == "FAILED"
    assert found["align"].data.metrics["loss"] == 1.0


def test_a_stage_that_is_told_to_end_does_not_wait_for_a_server_that_hangs(
    root: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spo.tracking.run.STOPPED_SECONDS", 0.1)
    send, hangs, over = Sender.send, threading.Event(), threading.Event()

    def hung(sender: Sender) -> bool:
        if hangs.is_set():
            over.wait()
        return send(sender)

    monkeypatch.setattr(Sender, "send", hung)
    with pytest.raises(KeyboardInterrupt), tracking.start(config, "align", root):
        hangs.set()
        raise KeyboardInterrupt
    [kept] = unsent(root).iterdir()
    assert [event["do"] for event, _ in Journal(kept).after(0)][-1] == "end"
    assert "not all of align could be tracked" in capsys.readouterr().err
    over.set()
    for thread in threading.enumerate():
        if thread.name == "tracking's end":
            thread.join()


class Store:
    """Stands for an MLflow client: keeps what it takes, and fails as told."""

    def __init__(self) -> None:
        self.metrics: list[Any] = []
        self.batches: list[int] = []
        self.error: Exception | None = None

    def log_batch(self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = ()) -> None:
        if self.error is not None:
            raise self.error
        self.batches.append(len(metrics) + len(params))
        self.metrics += metrics


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal.create(unsent(tmp_path))
    journal.note({**journal.state(), "run_id": "a run that was made before"})
    yield journal
    journal.release()


def test_metrics_are_sent_in_batches(journal: Journal, tmp_path: Path) -> None:
    store = Store()
    tracker, sender = JournalTracker(journal), Sender(store, journal, tmp_path)  # type: ignore[arg-type]
    for step in range(1500):
        tracker.log_metrics({"loss": 1.0}, step=step)
    assert sender.send()
    assert store.batches == [1000, 500]
    assert [metric.step for metric in store.metrics] == list(range(1500))


def test_what_a_store_that_is_away_does_not_take_comes_when_it_is_back_in_order_and_once(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store()
    tracker, sender = JournalTracker(journal), Sender(store, journal, tmp_path)  # type: ignore[arg-type]
    tracker.log_metrics({"loss": 1.0}, step=0)
    assert sender.send()
    store.error = OSError("connection refused")
    for step in (1, 2):
        tracker.log_metrics({"loss": 1.0}, step=step)
        assert not sender.send()
    assert capsys.readouterr().err.count("connection refused") == 1
    store.error = None
    assert Sender(store, journal, tmp_path).send()  # type: ignore[arg-type]
    assert [metric.step for metric in store.metrics] == [0, 1, 2]


def test_what_a_store_refuses_is_told_and_what_follows_it_still_arrives(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store()
    tracker, sender = JournalTracker(journal), Sender(store, journal, tmp_path)  # type: ignore[arg-type]
    store.error = MlflowException("param is too long", INVALID_PARAMETER_VALUE)
    tracker.log_params({"seed": 1})
    assert sender.send()
    assert capsys.readouterr().err == "warning: tracking lost something: param is too long\n"
    store.error = None
    tracker.log_metrics({"loss": 1.0})
    assert sender.send()
    assert [metric.key for metric in store.metrics] == ["loss"]


def test_a_line_that_a_crash_tore_off_is_left_out(journal: Journal) -> None:
    journal.append("metrics", rows=[])
    with (journal.folder / "events.jsonl").open("a") as file:
        file.write('{"do": "metr')
    assert [event["do"] for event, _ in journal.after(0)] == ["metrics"]
    journal.append("end", status="KILLED", time=0)
    assert [event["do"] for event, _ in journal.after(0)] == ["metrics", "end"]


def test_a_damaged_journal_is_told_and_keeps_nobody_from_starting(
    root: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Journal.create(unsent(root))
    damaged.append("start")  # without what a start has
    damaged.release()
    with tracking.start(config, "prepare", root):
        pass
    assert runs(root, config)["prepare"].info.status == "FINISHED"
    assert f"warning: {damaged.folder} cannot be sent" in capsys.readouterr().err
    assert list(unsent(root).iterdir()) == [damaged.folder]
    shutil.rmtree(damaged.folder)


def test_a_journal_that_cannot_be_written_is_told_once_and_does_not_end_the_stage(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(journal, "append", fail)
    tracker = JournalTracker(journal)
    tracker.log_params({"seed": 1})
    tracker.log_text("a.txt", "a")
    assert capsys.readouterr().err == "warning: tracking lost something: disk is full\n"


def test_the_run_of_a_process_that_was_killed_is_sent_and_ended_by_the_next_stage(root: Path, config: Config) -> None:
    program = (
        "import os, sys; from pathlib import Path; from spo import tracking; from spo.config import load_config\n"
        "config = load_config(Path(sys.argv[1]), 'tiny').model_copy(update={'profile': sys.argv[3]})\n"
        "with tracking.start(config, 'align', Path(sys.argv[2])) as tracker:\n"
        "    tracker.log_metrics({'loss': 0.5}, step=7); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", program, str(ROOT), str(root), config.profile]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    assert len(list(unsent(root).iterdir())) == 1
    with tracking.start(config, "evaluate", root):
        pass
    run = runs(root, config)["align"]
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"loss": 0.5}
    assert not list(unsent(root).iterdir())


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_has_everything_in_the_end(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "SECONDS", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with mlflow_server(tmp_path / "server", port):
        with tracking.start(config, "prepare", tmp_path) as tracker:
            tracker.log_metrics({"before": 1.0})
        align = tracking.start(config, "align", tmp_path, name="spo")
        tracker = align.__enter__()
        tracker.log_metrics({"loss": 1.0}, step=0)
    tracker.log_metrics({"loss": 0.5}, step=1)  # nobody is there
    tracker.log_image("samples", Image.new("RGB", (4, 4)))
    align.__exit__(None, None, None)
    with tracking.start(config, "evaluate", tmp_path) as tracker:
        tracker.log_metrics({"score": 2.0})
    assert "mlflow/unsent" in capsys.readouterr().err
    assert len(list(unsent(tmp_path).iterdir())) == 2
    with mlflow_server(tmp_path / "server", port):
        assert tracking.send_unsent(tmp_path) == 0
        found = runs(tmp_path, config)
        client = connect(tmp_path)
        history = client.get_metric_history(found["align spo"].info.run_id, "loss")
        assert [(metric.step, metric.value) for metric in history] == [(0, 1.0), (1, 0.5)]
        assert [file.path for file in client.list_artifacts(found["align spo"].info.run_id)] == ["samples.png"]
        assert found["evaluate"].data.metrics["score"] == 2.0
        assert {run.info.status for run in found.values()} == {"FINISHED"}
        parents = {run.data.tags.get("mlflow.parentRunId") for name, run in found.items() if name != "parent"}
        assert parents == {found["parent"].info.run_id}


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """A real one on this machine; killed on the way out."""
    folder.mkdir(exist_ok=True)
    options = ["--workers", "1", "--backend-store-uri", "sqlite:///runs.db", "--artifacts-destination", "artifacts"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), *options],
            cwd=folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
def test_stages_that_run_at_once_make_one_database_and_one_parent_and_lose_nothing(
    config: Config, tmp_path: Path
) -> None:
    steps = 2000  # two of the store's batches a process, sent while the other sends its own
    program = (
        "import sys; from pathlib import Path; from spo import tracking; from spo.config import load_config\n"
        "config = load_config(Path(sys.argv[1]), 'tiny')\n"
        "with tracking.start(config, 'align', Path(sys.argv[2]), name=sys.argv[3]) as tracker:\n"
        f"    for step in range({steps}): tracker.log_metrics({{'loss': step}}, step=step)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(ROOT), str(tmp_path), name]) for name in ("a", "b")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    found = runs(tmp_path, config.model_copy(update={"profile": "tiny"}))
    assert sorted(found) == ["align a", "align b", "parent"]
    client = connect(tmp_path)
    for name in ("align a", "align b"):
        history = client.get_metric_history(found[name].info.run_id, "loss")
        assert sorted(row.step for row in history) == list(range(steps))


def test_a_checkout_whose_path_means_something_in_a_uri_has_its_own_database(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(root).get_experiment_by_name("any")
    folder = tmp_path / "a%2Fb?c#d"
    shutil.copytree(root / "mlflow", folder / "mlflow")
    monkeypatch.chdir(folder)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/*"))
    client = connect(Path())
    made = client.create_experiment("here")
    assert client.get_experiment(made).name == "here"
    assert connect(root).get_experiment_by_name("here") is None
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/*")) == before


@pytest.mark.parametrize(
    "uri", ["mssql+pyodbc://user:secret@host/runs", "foo://x", "postgresql://h:port/x", "http://[::1"]
)
def test_a_wrong_address_of_a_store_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=r"cannot track at .*; correct or unset MLFLOW_TRACKING_URI") as raised:
        connect(tmp_path)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_the_pipeline_s_run_has_the_headline_and_each_method_a_run_with_the_same_names(
    root: Path, config: Config
) -> None:
    workspace = Workspace(config, root)
    figures = {"base": {"aesthetic": 0.4}} | {
        name: {"aesthetic": 0.5, "aesthetic_gain": 0.1, "released": "seed-0/step-1"} for name in config.methods
    }
    write_json(workspace.evaluate / "metrics.json", figures)
    Image.new("RGB", (4, 4)).save(workspace.evaluate / "samples.png")
    write_json(workspace.report / "metrics.json", {"pipeline_seconds": 3.0})
    (workspace.report / "summary.txt").write_text("spo wins.\nin short\n")
    (workspace.report / "report.html").write_text("<html>")
    for stage in ("evaluate", "report"):
        with tracking.start(config, stage, root) as tracker:
            tracker.log_metrics({"own": 1.0})
            show_results(config, stage, root, tracker)
    found = runs(root, config)
    assert found.keys() == {"parent", "evaluate", "report", "base", *config.methods}
    for name in config.methods:
        assert found[name].data.metrics == {"aesthetic": 0.5, "aesthetic_gain": 0.1}
        assert found[name].data.tags["method"] == name
        assert found[name].data.tags["mlflow.source.name"] == "python -m spo"
        assert found[name].data.tags["mlflow.parentRunId"] == found["parent"].info.run_id
        assert found[name].info.status == "FINISHED"
    parent = found["parent"]
    assert parent.data.metrics == {"aesthetic": 0.5, "aesthetic_gain": 0.1, "pipeline_seconds": 3.0}
    assert parent.data.tags["verdict"] == "spo wins."
    assert "in short" in parent.data.tags["mlflow.note.content"]
    files = {file.path for file in connect(root).list_artifacts(parent.info.run_id)}
    assert files == {"samples.png", "report.html", "summary.txt"}
    assert found["report"].data.metrics["own"] == 1.0


def test_a_run_says_what_made_it_and_who_started_it(root: Path, config: Config) -> None:
    with tracking.start(config, "evaluate", root):
        pass
    for name in ("evaluate", "parent"):
        tags = runs(root, config)[name].data.tags
        assert tags["mlflow.source.name"] == "python -m spo"
        assert tags["mlflow.user"]
    assert runs(root, config)["evaluate"].data.tags["mlflow.note.content"] == STAGES["evaluate"].help


def test_a_copied_checkout_writes_and_reads_in_its_own_folder(root: Path, config: Config, tmp_path: Path) -> None:
    with tracking.start(config, "prepare", root) as tracker:
        tracker.log_text("first.txt", "1")
    copy = tmp_path / "a copy"
    shutil.copytree(root / "mlflow", copy / "mlflow")
    first = runs(copy, config)["prepare"]
    for address in (first.info.artifact_uri, connect(copy).get_experiment(first.info.experiment_id).artifact_location):
        assert address.startswith(f"{copy.as_uri()}/mlflow/artifacts/spo-")
    with tracking.start(config, "align", copy) as tracker:
        tracker.log_text("second.txt", "2")
    second = runs(copy, config)["align"]
    assert [file.path for file in connect(copy).list_artifacts(second.info.run_id)] == ["second.txt"]
    assert list(copy.rglob("second.txt")) and not list(root.rglob("second.txt"))
    assert str(root) in runs(root, config)["prepare"].info.artifact_uri


def test_a_run_of_a_local_store_has_an_address_only_while_that_store_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_url(tmp_path, "1", "a") is None
    note_ui(5005, tmp_path)
    assert run_url(tmp_path, "1", "a") == "http://127.0.0.1:5005/#/experiments/1/runs/a?workflowType=machine_learning"
    shutil.copytree(tmp_path / "mlflow", tmp_path / "copy" / "mlflow")
    assert run_url(tmp_path / "copy", "1", "a") is None
    noted = tmp_path / "mlflow" / "ui.json"
    noted.write_text(noted.read_text().replace('"since": ', '"since": 1'))  # another process has the number now
    assert run_url(tmp_path, "1", "a") is None


def test_a_database_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_text("no database\n" * 1000)
    with pytest.raises(ConfigError, match=r"cannot track at .*mlflow\.db: file is not a database") as caught:
        connect(tmp_path)
    assert "\n" not in str(caught.value)
