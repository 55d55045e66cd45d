import os
import signal
import threading
import time
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.schemas.objects import StateType
from prefect.exceptions import TerminationSignal

from flows import process
from flows.full import full
from flows.stages import run_stage
from spo.config import Config
from spo.pipeline import PIPELINE

pytestmark = pytest.mark.usefixtures("prefect_server")


@flow
def run_prepare(force: bool = False) -> tuple[StateType, str | None]:
    state = run_stage("prepare", profile="tiny", force=force, return_state=True)
    return state.type, state.name


def test_a_stage_runs_once_then_is_up_to_date_and_is_restored_when_lost(project: Path) -> None:
    assert run_prepare() == (StateType.COMPLETED, "Completed")
    assert (project / "runs/tiny/prepare.txt").read_text() == "ready\n"
    assert run_prepare() == (StateType.COMPLETED, "UpToDate")
    (project / "runs/tiny/prepare.txt").unlink()
    (project / "dvc.lock").unlink()
    assert run_prepare() == (StateType.COMPLETED, "Restored")
    assert (project / "runs/tiny/prepare.txt").exists()


@flow
def run_align() -> tuple[str | None, str | None]:
    state = run_stage("align", profile="tiny", return_state=True)
    return state.name, state.message


def test_each_item_of_a_matrix_stage_is_told(project: Path) -> None:
    (project / "runs/tiny").mkdir(parents=True)
    (project / "runs/tiny/preference.txt").write_text("ready\n")
    assert run_align() == ("Completed", "align@spo: Completed, align@other: Completed")
    (project / "params.yaml").write_text("profile: tiny\nmethods: [spo, third]\n")
    assert run_align() == ("Completed", "align@spo: UpToDate, align@third: Completed")


def test_force_runs_a_stage_that_has_not_changed(project: Path) -> None:
    run_prepare()
    assert run_prepare(force=True) == (StateType.COMPLETED, "Completed")


def test_a_stage_s_lines_are_logged_without_what_a_progress_bar_overwrote(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (project / "prepare.sh").write_text(
        "printf ' 10%%\\r100%% done\\n\\n'; printf '\\377 odd byte\\n' >&2\n"
        "mkdir -p runs/tiny; echo > runs/tiny/prepare.txt\n"
    )
    run_prepare()
    assert "100% done" in caplog.messages
    assert "\ufffd odd byte" in caplog.messages
    assert not any("10%\r" in message for message in caplog.messages)


def test_terminating_a_flow_run_ends_its_stage_even_one_that_ignores_sigterm(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE_SECONDS", 1.0)
    (project / "prepare.sh").write_text("trap '' TERM; sleep 60 & echo $$ $! > pids; while :; do sleep 0.1; done\n")
    pids = project / "pids"

    def terminate_once_running() -> None:
        while not (pids.exists() and pids.read_text()):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    # Prefect gives the signal on to the handler that it found, which must not be the one that ends the tests.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        threading.Thread(target=terminate_once_running, daemon=True).start()
        with pytest.raises(TerminationSignal):
            full(stages=["prepare"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not [pid for pid in pids.read_text().split() if _is_running(pid)]


def test_the_stages_are_those_of_the_configuration() -> None:
    sections = {name for name in Config.model_fields if name in PIPELINE}
    assert {*sections, "report"} == set(PIPELINE)


def _is_running(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
