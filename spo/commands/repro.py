"""`python -m spo repro`."""

import sys
import time
import uuid
from typing import Annotated

import typer

from spo.config import load_config
from spo.errors import SpoError
from spo.runtime.processes import child_environment, run_group
from spo.workspace import Workspace


def repro(force: Annotated[bool, typer.Option("--force", help="Run all stages, changed or not.")] = False) -> None:
    """Run the stages that have changed, in order.

    At the end it says where the results are.
    """
    from spo import tracking

    workspace = Workspace(load_config())
    environment = {tracking.PIPELINE_RUN: uuid.uuid4().hex, **child_environment()}
    start = time.monotonic()
    code = run_group([sys.executable, "-m", "dvc", "repro", *(["--force"] if force else [])], environment)
    if code:
        raise SpoError(f"the pipeline stopped (dvc's exit code {code}); the lines above name the stage and the cause")
    summary = (workspace.report / "summary.txt").read_text(encoding="utf-8").strip()
    print(f"\n{summary}\n")
    for what, where in {
        "report": workspace.report / "report.html",
        "images": workspace.evaluate / "images",
        "LoRA weights": workspace.loras,
        "runs": "`make ui`, then http://127.0.0.1:5000",
        "this took": f"{time.monotonic() - start:.0f} s",
    }.items():
        print(f"{what:<13}{where}")
