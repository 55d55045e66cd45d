"""prefect.yaml for real: a server, a worker and the deployed flow, all in a temporary home on this machine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

ROOT = Path(__file__).parents[2]
START_SECONDS = 300.0  # about 20 on an idle machine


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {
        **clean,
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "DO_NOT_TRACK": "1",
    }


@pytest.mark.slow
def test_the_deployed_flow_ends_truthfully_is_cancelled_with_its_children_and_runs_one_at_a_time(
    project: Path, environment: dict[str, str]
) -> None:
    shutil.copy(ROOT / "prefect.yaml", project)
    shutil.copytree(ROOT / "flows", project / "flows", ignore=shutil.ignore_patterns("__pycache__"))

    def prefect(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        return subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True, timeout=300)

    with ExitStack() as stack:  # the worker ends before the server
        stack.enter_context(_running(["server", "start", "--host", "127.0.0.1"], project, environment, "server.log"))
        _wait_until_healthy(environment["PREFECT_API_URL"], project / "server.log")
        for command in (
            ["work-pool", "create", "spo-gpu", "--type", "process"],
            ["work-pool", "set-concurrency-limit", "spo-gpu", "1"],
            ["deploy", "--all"],
        ):
            done = prefect(*command)
            assert done.returncode == 0, done.stdout + done.stderr
        stack.enter_context(_running(["worker", "start", "--pool", "spo-gpu"], project, environment, "worker.log"))

        done = prefect("deployment", "run", "spo/full", "--watch")
        assert done.returncode == 0, done.stdout + done.stderr + (project / "worker.log").read_text()
        assert (project / "runs/tiny/report/report.html").exists()

        (project / "evaluate.sh").write_text("exit 3\n")
        done = prefect("deployment", "run", "spo/evaluate", "--watch")
        assert done.returncode != 0, done.stdout + done.stderr
        assert "stage evaluate failed" in (project / "worker.log").read_text()

        pids = project / "pids"
        (project / "align.sh").write_text("sleep 3600 & echo $$ $! > pids; wait\n")
        with _client(environment) as client:
            first = _start(client, "spo/full")
            _wait(lambda: pids.is_file() and len(pids.read_text().split()) == 2, project / "worker.log")
            second = _start(client, "spo/evaluate", stages=["prepare"])
            time.sleep(5)  # five looks of the worker
            assert client.read_flow_run(second).start_time is None
            done = prefect("flow-run", "cancel", str(first))
            assert done.returncode == 0, done.stdout + done.stderr
            _wait(lambda: client.read_flow_run(first).state.is_final(), project / "worker.log")
            assert client.read_flow_run(first).state.is_cancelled()
            _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split()), pids)
            _wait(lambda: client.read_flow_run(second).state.is_final(), project / "worker.log")
            assert client.read_flow_run(second).state.is_completed()


@contextmanager
def _client(environment: dict[str, str]) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}):
        with get_client(sync_client=True) as client:
            yield client


def _start(client: SyncPrefectClient, deployment: str, **parameters: object) -> UUID:
    found = client.read_deployment_by_name(deployment)
    return client.create_flow_run_from_deployment(found.id, parameters=parameters).id


def _wait(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@contextmanager
def _running(arguments: Sequence[str], folder: Path, environment: dict[str, str], log: str) -> Iterator[None]:
    """A prefect service in the background, with its children; ended, not left, on the way out."""
    with (folder / log).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_healthy(api: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{api}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no server after {START_SECONDS} s:\n{log.read_text()}")
