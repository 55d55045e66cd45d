import json
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
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
    assert "SPO wins." in shown["report"]
    assert "| spo.win_rate | 0.7123 |\n| spo.prompts | 128 |\n" in shown["report"]
    assert (project / "runs/tiny/report/report.html").as_uri() in shown["report-page"]
    assert "http://127.0.0.1:5000/#/experiments/1/runs/abc" in shown["mlflow-run"]
    rows = {row["stage"]: row for row in json.loads(shown["stages"])}
    assert rows["align"]["items"] == "align@spo: Completed, align@other: Completed"
    assert _tags(state) == ["profile:tiny"]


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
    assert state.is_completed()
    assert "version 1 (spo) not promoted: aesthetic\n  aesthetic: +0.0" in _artifacts(state)["promotion"]
    assert _tags(state) == ["kept", "profile:tiny"]


def _tags(state: State) -> list[str]:
    with get_client(sync_client=True) as client:
        return sorted(client.read_flow_run(state.state_details.flow_run_id).tags)


def _artifacts(state: State) -> dict[str, str]:
    """What the run shows, by key."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        return {artifact.key: artifact.data for artifact in client.read_artifacts(artifact_filter=only)}
