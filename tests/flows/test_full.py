import json
import re
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import State

from flows.full import full, main


def test_the_server_imports_with_the_installed_fastapi() -> None:
    import prefect.server.api.server  # noqa: F401


def test_an_unknown_stage_is_refused_at_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--stage", "deploy"])
    assert exit_.value.code == 2
    assert "train_preference" in capsys.readouterr().err


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_runs_all_stages_in_order_under_one_run_and_shows_the_report(project: Path) -> None:
    state = full(return_state=True)
    assert state.result() == dict.fromkeys(("prepare", "train_preference", "align", "evaluate", "report"), "Completed")
    assert (project / "runs/tiny/align-spo.txt").exists()
    assert (project / "runs/tiny/align-other.txt").exists()
    assert (project / "pipeline_run").read_text().strip() == str(_flow_run_id(state))
    shown = _artifacts(state)
    assert "SPO wins." in shown["report-tiny"]
    assert "| spo.win_rate | 0.7123 |\n| spo.prompts | 128 |\n" in shown["report-tiny"]
    assert "/runs/abc/artifacts/report.html?workflowType=machine_learning" in shown["report-page-tiny"]
    assert "http://127.0.0.1:5000/#/experiments/1/runs/abc" in shown["mlflow-run-tiny"]
    rows = {row["stage"]: row for row in json.loads(shown["stages-tiny"])}
    assert rows["align"]["items"] == "align@spo: Completed, align@other: Completed"
    assert _tags(state) == ["profile:tiny"]
    assert re.fullmatch(r"tiny \d\d-\d\d \d\d:\d\d", _read(state).name)


@pytest.mark.usefixtures("prefect_server")
def test_a_failing_stage_fails_the_flow_with_its_last_lines_and_ends_it(project: Path) -> None:
    (project / "prepare.sh").write_text("seq -f 'line %g.' 100; echo out of memory >&2; exit 3\n")
    state = full(stages=["train_preference", "prepare"], return_state=True)
    assert state.is_failed()
    message = str(state.message)
    assert "stage prepare failed (exit code 255)" in message
    assert "line 100.\nout of memory\n" in message
    assert "line 50." not in message
    assert "exited with 3" in message  # DVC's word for the stage's own code
    assert not (project / "runs/tiny/preference.txt").exists()


@pytest.mark.usefixtures("prefect_server")
def test_the_command_ends_0_after_success_and_1_after_a_mistake(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--stage", "prepare"]) == 0
    assert main(["--stage", "prepare", "--profile", "sdxxl"]) == 1
    assert "error: profile is 'sdxxl'; use one of ['sd15', 'tiny']" in capsys.readouterr().err


def _flow_run_id(state: State) -> str:
    return str(state.state_details.flow_run_id)


@pytest.mark.usefixtures("prefect_server")
def test_a_retrain_decides_on_promotion_and_shows_why(project: Path) -> None:
    (project / "spo.py").write_text("print('version 1 (spo) not promoted: aesthetic'); print('  aesthetic: +0.0')\n")
    state = full(stages=["prepare"], promote=True, return_state=True)
    assert _read(state).name.startswith("tiny prepare promote ")
    assert state.is_completed()
    assert "version 1 (spo) not promoted: aesthetic\n  aesthetic: +0.0" in _artifacts(state)["promotion-tiny"]
    assert _tags(state) == ["kept", "profile:tiny"]


@pytest.mark.usefixtures("prefect_server")
def test_what_a_stage_lacks_ends_the_run_before_dvc_removes_outputs(project: Path) -> None:
    assert full(stages=["prepare"], return_state=True).is_completed()
    (project / "prepare.sh").write_text("exit 1\n")
    (project / "spo.py").write_text("import sys; print('FAIL', *sys.argv[1:]); sys.exit(1)\n")
    state = full(stages=["prepare"], return_state=True)
    assert "preflight failed" in str(state.message)
    assert "FAIL check --quick --stage prepare" in str(state.message)
    assert (project / "runs/tiny/prepare.txt").read_text() == "ready\n"


@pytest.mark.usefixtures("prefect_server")
def test_a_run_of_another_profile_leaves_the_checkout_as_it_was(project: Path) -> None:
    before = {path: path.read_text() for path in (project / "params.yaml", project / "configs/sd15.yaml")}
    (project / "prepare.sh").write_text("cp params.yaml seen.yaml; mkdir -p runs/sd15; touch runs/sd15/prepare.txt\n")
    state = full(profile="sd15", overrides={"evaluate.num_prompts": 7}, stages=["prepare"], return_state=True)
    assert state.is_completed()
    assert "profile: sd15" in (project / "seen.yaml").read_text()
    assert {path: path.read_text() for path in before} == before
    assert "stages-sd15" in _artifacts(state)
    assert _read(state).name.startswith("sd15 prepare evaluate.num_prompts=7 ")


def _read(state: State) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(state.state_details.flow_run_id)


def _tags(state: State) -> list[str]:
    return sorted(_read(state).tags)


def _artifacts(state: State) -> dict[str, str]:
    """What the run shows, by key."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        return {artifact.key: artifact.data for artifact in client.read_artifacts(artifact_filter=only)}
