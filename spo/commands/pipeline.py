"""Commands around the pipeline: repro, check, promote and mlflow-ui."""

import os
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import Annotated

import typer

from spo.commands.preflight import Finding, require_all, show_findings
from spo.commands.stage import Profile
from spo.config import load_config
from spo.errors import SpoError, one_line
from spo.pipeline import PIPELINE
from spo.runtime.environment import require_repository
from spo.runtime.libraries import set_up_libraries
from spo.runtime.processes import child_environment, run_group
from spo.workspace import Workspace


def repro(
    force: Annotated[bool, typer.Option("--force", help="Run all stages, changed or not.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Preference models or alignments at once (default: as many as cores; 1 with a GPU)."),
    ] = None,
) -> None:
    """Run the stages that have changed, in order.

    At the end it says where the results are.
    """
    from spo import tracking
    from spo.commands.side_by_side import fitting_jobs, items_of, run_side_by_side

    workspace, store = Workspace(load_config()), tracking.masked(tracking.store())
    require_repository(Path())
    set_up_libraries()
    require_all(workspace.config, Path())
    environment = {tracking.PIPELINE_RUN: uuid.uuid4().hex, **child_environment()}
    start = time.monotonic()
    jobs = fitting_jobs(workspace.config) if jobs is None else jobs
    groups = items_of(workspace.config) if jobs > 1 else []
    code = 0
    for items in groups if force else groups[:-1]:
        code = code or run_side_by_side(items, jobs=jobs, environment=environment, force=force)
    options = ["--force"] if force and not groups else []  # `dvc repro` runs what is left, such as the report
    code = code or run_group([sys.executable, "-m", "dvc", "repro", *options], environment)
    if code:
        raise SpoError(f"the pipeline stopped (dvc's exit code {code}); the lines above name the stage and the cause")
    summary = (workspace.report / "summary.txt").read_text(encoding="utf-8").strip()
    print(f"\n{summary}\n")
    for name, place in {
        "report": workspace.report / "report.html",
        "images": workspace.evaluate / "images",
        "LoRA weights": workspace.loras,
        "runs": store if store.startswith("http") else "`make ui`, then http://127.0.0.1:5000",
        "this took": f"{time.monotonic() - start:.0f} s",
    }.items():
        print(f"{name:<13}{place}")


def check(
    profile: Profile = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Look only at settings, files, disk and memory; run nothing.")
    ] = False,
    stages: Annotated[
        list[str] | None, typer.Option("--stage", metavar="NAME", help="With --quick: look only at what it needs.")
    ] = None,
) -> int:
    """Find what would end a run after hours.

    Looks at settings, files, disk and memory, then runs all stages in miniature.
    """
    if stages and not quick:
        raise SpoError("--stage goes with --quick; the miniature runs all stages")
    if unknown := sorted(set(stages or ()) - set(PIPELINE)):
        raise SpoError(f"--stage names {unknown}; use some of {list(PIPELINE)}")
    config = load_config(profile=profile)
    _show(Finding("configuration", True, f"configs/{config.profile}.yaml and params.yaml"))
    set_up_libraries()
    if quick:
        good = show_findings(config, Path(), _show, stages or PIPELINE)
    else:
        from spo.commands.miniature import check_all

        good = check_all(config, Path(), _show)
    print(f"profile {config.profile} {'can run' if good else 'cannot run yet: repair the lines marked FAIL'}")
    return 0 if good else 1


def _show(finding: Finding) -> None:
    mark = "FAIL" if not finding.good else "note" if finding.doubtful else "ok  "
    print(f"{mark}  {finding.what:<34} {finding.detail}", flush=True)


def promote(
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose LoRA (default: promote.method, else the first method).")
    ] = None,
    against_base: Annotated[
        bool, typer.Option("--against-base", help="Compare with the base, not with the present champion.")
    ] = False,
    profile: Profile = None,
) -> None:
    """Make the evaluated LoRA champion if it has won.

    Registers it first; it becomes champion if it beats the present one.
    """
    config = load_config(profile=profile)
    set_up_libraries()
    from spo import tracking
    from spo.commands.promote import run

    with tracking.store_errors():
        run(config, method=method, against_base=against_base)


def mlflow_ui(port: int = 5000) -> None:
    """Browse the tracked runs.

    This process becomes the server, which only this machine can reach.
    """
    from spo import tracking

    uri = tracking.store()
    if "MLFLOW_TRACKING_URI" not in os.environ and not tracking.database().is_file():
        raise SpoError(f"there are no runs at {uri} yet; run `python -m spo repro` first")
    if not uri.startswith("http"):
        _require_free(port)
    if left := tracking.send_unsent():
        print(f"warning: {left} runs still wait in mlflow/unsent: {tracking.masked(uri)} is away", file=sys.stderr)
    if uri.startswith("http"):
        print(f"the runs are at {tracking.masked(uri)}")
        return
    tracking.note_ui(port)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    print(f"http://127.0.0.1:{port} (stop with Ctrl-C)", flush=True)
    server = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *server, "--backend-store-uri", uri])


def _require_free(port: int) -> None:
    """SpoError if a server cannot listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise SpoError(f"port {port} cannot be used ({one_line(error)}); choose another: --port 5001") from None
