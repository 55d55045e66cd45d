"""A small real DVC project whose stages have the pipeline's names, and a Prefect server to run flows against."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

import flows  # noqa: F401  (its settings come before prefect's import)

# isort: split
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.delivery.conftest import ROOT, shell
from tests.delivery.test_docker import DOCKER, running, wait_until_healthy

DVC_YAML = """
stages:
  prepare:
    cmd: sh prepare.sh
    deps: [prepare.sh]
    outs: ["runs/${profile}/prepare.txt"]
  train_preference:
    cmd: sh train_preference.sh ${profile}
    deps: [train_preference.sh, "runs/${profile}/prepare.txt"]
    outs: ["runs/${profile}/preference.txt"]
  align:
    matrix: {name: "${methods}"}
    cmd: sh align.sh ${profile} ${item.name}
    deps: [align.sh, "runs/${profile}/preference.txt"]
    outs: ["runs/${profile}/align-${item.name}.txt"]
  evaluate:
    cmd: sh evaluate.sh ${profile}
    deps: [evaluate.sh, "runs/${profile}/align-spo.txt"]
    outs: ["runs/${profile}/evaluate.txt"]
  report:
    cmd: sh report.sh ${profile}
    deps: [report.sh, "runs/${profile}/evaluate.txt"]
    outs: ["runs/${profile}/report"]
"""

MLFLOW_RUN = "http://127.0.0.1:5000/#/experiments/1/runs/abc?workflowType=machine_learning"
SHIPPED = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
SHIPPED["align"]["other"] = SHIPPED["align"]["spo"]
FILES = {
    "dvc.yaml": DVC_YAML,
    "params.yaml": "# which one\nprofile: tiny  # of configs/\nmethods: [spo, other]\n",
    "configs/tiny.yaml": yaml.safe_dump(SHIPPED),
    "configs/sd15.yaml": yaml.safe_dump(SHIPPED),
    "prepare.sh": 'echo "prompts are ready"; mkdir -p runs/tiny; echo ready > runs/tiny/prepare.txt\n'
    f"echo tracked at '{MLFLOW_RUN}'; echo $SPO_PIPELINE_RUN > pipeline_run\n",
    "train_preference.sh": "cat runs/$1/prepare.txt > runs/$1/preference.txt\n",
    "align.sh": "echo $2 > runs/$1/align-$2.txt\n",
    "evaluate.sh": "cat runs/$1/align-spo.txt > runs/$1/evaluate.txt\n",
    "report.sh": f"echo tracked at '{MLFLOW_RUN}'\n"
    "mkdir -p runs/$1/report; cd runs/$1/report; echo 'SPO wins.' > summary.txt\n"
    """echo '{"spo": {"win_rate": 0.712345, "prompts": 128}}' > metrics.json; echo '<html>' > report.html\n""",
}


@pytest.fixture(scope="session")
def made_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as committed; copied for each test, since making it takes seconds."""
    folder = tmp_path_factory.mktemp("made") / "project"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    environment = {**os.environ, "DVC_NO_ANALYTICS": "true"}
    for command in (
        ["git", "init", "-q"],
        [sys.executable, "-m", "dvc", "init", "-q"],
        [sys.executable, "-m", "dvc", "config", "core.check_update", "false"],
    ):
        subprocess.run(command, cwd=folder, env=environment, check=True)
    return folder


@pytest.fixture
def project(made_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trivial DVC project, with the current folder in it."""
    folder = shutil.copytree(made_project, tmp_path / "project")
    (folder / "spo.py").write_text("print('profile can run')\n")  # in place of `python -m spo`
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server as its container starts it, the one that flows run against; the variables of who works with it."""
    folder = tmp_path_factory.mktemp("prefect")
    port, worker_port = free_ports(2)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    variables = {
        **clean,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": port,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
        "PREFECT_WORKER_WEBSERVER_PORT": worker_port,
        "SPO_SERVICE_FILE": str(folder / "service"),
    }
    api = {PREFECT_API_URL: variables["PREFECT_API_URL"]}
    with serving("prefect-server", folder, variables), temporary_settings(api):
        yield variables
        for queue in (APILogWorker, EventsWorker):  # they still have something to send
            queue.drain_all()


@contextmanager
def serving(service: str, folder: Path, variables: dict[str, str]) -> Iterator[None]:
    """A container's service, unhealthy before and healthy within the block; `folder` gets its `log`."""
    healthcheck = f"{sys.executable} {DOCKER / 'healthcheck.py'} {service}"
    assert "unhealthy: " in shell(f"! {healthcheck}", folder, variables)
    with running(DOCKER / "entrypoint.sh", service, folder=folder, variables=variables):
        wait_until_healthy(healthcheck, folder, variables)
        yield


def free_ports(count: int) -> list[str]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
