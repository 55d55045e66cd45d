"""The containers' services and a retrain through them: server, worker and healthchecks as docker/ starts them."""

import json
import os
import shutil
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.delivery.conftest import shell
from tests.delivery.test_docker import DOCKER, ROOT, running, wait_until_healthy


@pytest.mark.slow
def test_a_worker_in_its_container_retrains_for_a_runner_on_its_machine(project: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "prefect.yaml", project)
    shutil.copytree(ROOT / "flows", project / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    shell("git add -A && git -c user.name=t -c user.email=t commit -qm start", project, os.environ)
    server_port, worker_port = free_ports(2)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    variables = {
        **clean,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{server_port}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": server_port,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
        "PREFECT_WORKER_WEBSERVER_PORT": worker_port,
        "SPO_SERVICE_FILE": str(tmp_path / "service"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "ENGINE": "prefect",
        "PROFILE": "tiny",
    }
    healthcheck = f"{sys.executable} {DOCKER / 'healthcheck.py'}"
    with ExitStack() as stack:  # the worker ends before the server
        for service in ("prefect-server", "worker"):
            assert "unhealthy: " in shell(f"! {healthcheck} {service}", project, variables)
            stack.enter_context(running(DOCKER / "entrypoint.sh", service, folder=project, variables=variables))
            wait_until_healthy(f"{healthcheck} {service}", project, variables)
        shell(f"{ROOT / '.github/scripts/retrain.sh'} {tmp_path / 'out'}", project, variables)
    assert "SPO wins." in (tmp_path / "summary.md").read_text()
    assert "dvc.lock" in (tmp_path / "out" / "changes.patch").read_text()
    assert json.loads((project / "runs/tiny/report/metrics.json").read_text())


def free_ports(count: int) -> list[str]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
