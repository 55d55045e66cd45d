"""prefect.yaml for real: the containers' server and worker as docker/ starts them, and the deployed flow."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.states import Cancelled, Cancelling

from tests.delivery.conftest import ROOT, shell
from tests.flows.conftest import serving

WAIT_SECONDS = 300.0
pytestmark = pytest.mark.slow  # all use `deployed`


@pytest.fixture(scope="module")
def deployed(
    made_project: Path, prefect_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The project as it was committed, deployed by the worker that runs its flows."""
    folder = shutil.copytree(made_project, tmp_path_factory.mktemp("deployed") / "project")
    shutil.copy(ROOT / "prefect.yaml", folder)
    shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data", folder / "data")
    (folder / ".gitignore").write_text("log\n.cache\n")
    shell("git add -A && git -c user.name=t -c user.email=t commit -qm start", folder, os.environ)
    with serving("worker", folder, prefect_server):
        yield folder


@pytest.fixture
def client(prefect_server: dict[str, str]) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def prefect(line: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *line.split()]
    return subprocess.run(command, cwd=folder, env=variables, text=True, capture_output=True, check=False)


def test_a_worker_in_its_container_retrains_for_a_runner_on_its_machine(
    deployed: Path, prefect_server: dict[str, str], tmp_path: Path
) -> None:
    summary, out = tmp_path / "summary.md", tmp_path / "out"
    variables = {**prefect_server, "GITHUB_STEP_SUMMARY": str(summary), "ENGINE": "prefect", "PROFILE": "tiny"}
    shell(f"{ROOT / '.github/scripts/retrain.sh'} {out}", deployed, variables)
    assert "SPO wins." in summary.read_text()
    assert "dvc.lock" in (out / "changes.patch").read_text()
    assert json.loads((deployed / "runs/tiny/report/metrics.json").read_text())
    assert (deployed / "runs/tiny/report/report.html").exists()


def test_a_deployed_run_that_fails_fails_its_command(deployed: Path, prefect_server: dict[str, str]) -> None:
    (deployed / "evaluate.sh").write_text("exit 3\n")
    done = prefect("deployment run spo/evaluate --watch", deployed, prefect_server)
    assert done.returncode != 0, done.stdout + done.stderr
    assert "stage evaluate failed" in (deployed / "log").read_text()


def test_runs_go_one_at_a_time_and_a_cancelled_one_ends_with_its_children(
    deployed: Path, prefect_server: dict[str, str], client: SyncPrefectClient
) -> None:
    log, pids = deployed / "log", deployed / "pids"
    (deployed / "align.sh").write_text("sleep 3600 & echo $$ $! > pids; wait\n")
    first = start(client, "spo/full")
    wait_for(lambda: pids.is_file() and len(pids.read_text().split()) == 2, log)
    second = start(client, "spo/evaluate", stages=["prepare"])
    for _ in range(2):  # the worker looks for runs to start, and starts none
        wait_for(looks_again(client), log)
    assert client.read_flow_run(second).start_time is None
    done = prefect(f"flow-run cancel {first}", deployed, prefect_server)
    assert done.returncode == 0, done.stdout + done.stderr
    for run in (first, second):
        wait_for(lambda run=run: client.read_flow_run(run).state.is_final(), log)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split()), pids)
    assert client.read_flow_run(first).state.is_cancelled()
    assert client.read_flow_run(second).state.is_completed()


def test_changed_data_starts_a_retraining_and_the_nightly_schedule_waits_to_be_switched_on(
    deployed: Path, prefect_server: dict[str, str], client: SyncPrefectClient
) -> None:
    retrain = client.read_deployment_by_name("spo/retrain")
    assert [schedule.active for schedule in retrain.schedules] == [False]
    done = prefect("event emit spo.data.changed --resource-id spo.data", deployed, prefect_server)
    assert done.returncode == 0, done.stdout + done.stderr
    only = DeploymentFilter(id=DeploymentFilterId(any_=[retrain.id]))
    wait_for(lambda: client.read_flow_runs(deployment_filter=only) != [], deployed / "log")
    [run] = client.read_flow_runs(deployment_filter=only)
    client.set_flow_run_state(run.id, Cancelling(), force=True)

    def is_over() -> bool:
        now = client.read_flow_run(run.id)
        if not now.state.is_final() and now.infrastructure_pid is None:  # picked by the worker, but nothing to end yet
            client.set_flow_run_state(run.id, Cancelled(), force=True)
        return now.state.is_final()

    wait_for(is_over, deployed / "log")


def test_the_example_of_an_automation_can_be_created(
    deployed: Path, prefect_server: dict[str, str], client: SyncPrefectClient
) -> None:
    done = prefect(f"automation create --from-file {ROOT / 'docs/automations.yaml'}", deployed, prefect_server)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "spo failed" in done.stdout


def start(client: SyncPrefectClient, deployment: str, **parameters: object) -> UUID:
    found = client.read_deployment_by_name(deployment)
    return client.create_flow_run_from_deployment(found.id, parameters=parameters).id


def looks_again(client: SyncPrefectClient) -> Callable[[], bool]:
    """Whether the worker has asked for runs since this call."""

    def last() -> object:
        [queue] = client.request(
            "POST", "/work_pools/{work_pool_name}/queues/filter", path_params={"work_pool_name": "spo-gpu"}, json={}
        ).json()
        return queue["last_polled"]

    before = last()
    return lambda: last() != before


def wait_for(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
