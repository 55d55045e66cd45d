"""The pipeline as the flow `spo`: its stages in order, then their results as artifacts of the run.

    python -m flows.full [--profile P] [--stage S ...] [--set KEY=VALUE ...] [--keep] [--force] [--promote]

runs it in the current folder, the project's, without a server; `prefect.yaml` deploys it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.settings import parse, profile_name, settings_of_run
from flows.stages import Stage, artifact_key, preflight, promote_released, run_stage
from spo.config import load_config
from spo.errors import SpoError
from spo.pipeline import PIPELINE
from spo.runtime.environment import require_repository
from spo.runtime.text import flatten
from spo.workspace import Workspace


def run_name() -> str:
    """Such as `tiny evaluate report align.spo.beta=5 11-27 01:31`."""
    asked = flow_run.parameters
    try:
        profile = profile_name(asked.get("profile"))
    except SpoError:  # the run is about to say what is wrong
        profile = str(asked.get("profile"))
    settings = [f"{key}={value}" for key, value in (asked.get("overrides") or {}).items()]
    flags = [name for name in ("force", "promote") if asked.get(name)]
    return " ".join([profile, *(asked.get("stages") or []), *settings, *flags, time.strftime("%m-%d %H:%M")])


@flow(name="spo", flow_run_name=run_name, retries=0)
def full(
    profile: str | None = None,
    stages: list[Stage] | None = None,
    overrides: dict[str, Any] | None = None,
    force: bool = False,
    promote: bool = False,
    keep: bool = False,
) -> dict[str, str]:
    """Run all stages of the pipeline, or those named, in the pipeline's order.

    profile: one of configs/*.yaml, in params.yaml during the run; None runs the one named there.
    overrides: settings for this run, such as {"align.spo.beta": 5}, in the profile's file during the run.
    force: run stages although nothing has changed.
    promote: at the end, make the evaluated LoRA champion if it beats the present one.
    keep: leave profile and overrides in the files, for later runs.
    Returns the outcome of each stage: Completed, Restored or UpToDate.
    """
    require_repository(Path())
    with settings_of_run(profile, overrides or {}, keep=keep) as changes:
        for change in changes:
            get_run_logger().info(change)
        return _run(load_config().profile, stages, force=force, promote=promote)


def _run(name: str, stages: list[Stage] | None, *, force: bool, promote: bool) -> dict[str, str]:
    tag_run(f"profile:{name}")
    rows, outcomes = [], {}
    chosen = [stage for stage in PIPELINE if stages is None or stage in stages]
    preflight(chosen)
    for stage in chosen:
        start = time.monotonic()
        state = run_stage(stage, profile=name, force=force)
        outcomes[str(stage)] = str(state.name)
        row = {"stage": stage, "outcome": state.name, "items": state.message or ""}
        rows.append({**row, "seconds": round(time.monotonic() - start, 1)})
    create_table_artifact(
        key=artifact_key("stages", name), table=rows, description="What ran, and what has not changed"
    )
    if "report" in outcomes:
        publish_report(name, Workspace(load_config()).report)
    if promote:
        decision = promote_released()
        first_line = decision.partition("\n")[0]
        key = artifact_key("promotion", name)
        create_markdown_artifact(key=key, markdown=f"```\n{decision}\n```", description=first_line)
        tag_run("kept" if "not promoted" in decision else "promoted")
    return outcomes


def publish_report(profile: str, report: Path) -> None:
    """Show the report's verdict and figures with the run."""
    summary = (report / "summary.txt").read_text(encoding="utf-8").strip()
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    rows = "\n".join(
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in flatten(metrics).items()
    )
    create_markdown_artifact(
        key=artifact_key("report", profile),
        markdown=f"# Profile {profile}\n\n```\n{summary}\n```\n\nThe page: `{(report / 'report.html').resolve()}`\n\n"
        f"| metric | value |\n|---|---|\n{rows}\n",
        description=summary.partition("\n")[0],
    )


def tag_run(*tags: str) -> None:
    """Add tags to the present flow run."""
    with get_client(sync_client=True) as client:
        there = client.read_flow_run(flow_run.id).tags
        client.update_flow_run(flow_run.id, tags=[*there, *(tag for tag in tags if tag not in there)])


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows.full", description="Run the pipeline as a Prefect flow.")
    add = parser.add_argument
    add("--profile", help="one of configs/*.yaml (default: the one in params.yaml)")
    add("--stage", dest="stages", nargs="+", action="extend", choices=PIPELINE, help="(default: all)")
    add("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="a setting of this run")
    add("--keep", action="store_true", help="leave profile and settings in the files, for later runs")
    add("--force", action="store_true", help="run stages although nothing has changed")
    add("--promote", action="store_true", help="make the LoRA champion if it beats the present one")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    try:
        full(**vars(options) | {"overrides": parse(options.overrides)})
    except (SpoError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
