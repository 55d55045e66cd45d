"""The pipeline as the flow `spo`: its stages in order, then their results as artifacts of the run.

    python -m flows.full [--profile P] [--stage S ...] [--set KEY=VALUE ...] [--force] [--promote]

runs it in the current folder, the project's, without a server; `prefect.yaml` deploys it.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.artifacts import publish_promotion, publish_report, publish_stages
from flows.overrides import override, parse
from flows.profile import use_profile
from flows.stages import Stage, promote_released, run_stage
from spo.config import load_config
from spo.errors import SpoError
from spo.pipeline import PIPELINE
from spo.workspace import Workspace


@flow(name="spo", retries=0)
def full(
    profile: str | None = None,
    stages: list[Stage] | None = None,
    overrides: dict[str, Any] | None = None,
    force: bool = False,
    promote: bool = False,
) -> dict[str, str]:
    """Run all stages of the pipeline, or those named, in the pipeline's order.

    profile: one of configs/*.yaml, written to params.yaml; None runs the one named there.
    overrides: settings to change first, such as {"align.spo.beta": 5}; they are written to the profile's file.
    force: run stages although nothing has changed.
    promote: at the end, make the evaluated LoRA champion if it beats the present one.
    Returns the outcome of each stage: Completed, Restored or UpToDate.
    """
    for change in override(profile, overrides or {}):
        get_run_logger().info(change)
    name = use_profile(profile)
    tag_run(f"profile:{name}")
    rows, outcomes = [], {}
    for stage in (stage for stage in PIPELINE if stages is None or stage in stages):
        start = time.monotonic()
        state = run_stage(stage, force=force)
        outcomes[str(stage)] = str(state.name)
        rows.append((stage, str(state.name), state.message or "", time.monotonic() - start))
    publish_stages(rows)
    if "report" in outcomes:
        publish_report(name, Workspace(load_config()).report)
    if promote:
        publish_promotion(decision := promote_released())
        tag_run("kept" if "not promoted" in decision else "promoted")
    return outcomes


def tag_run(*tags: str) -> None:
    """Add tags to the present flow run."""
    with get_client(sync_client=True) as client:
        there = client.read_flow_run(flow_run.id).tags
        client.update_flow_run(flow_run.id, tags=[*there, *(tag for tag in tags if tag not in there)])


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows.full", description="Run the pipeline as a Prefect flow.")
    parser.add_argument("--profile", help="one of configs/*.yaml, written to params.yaml (default: the one there)")
    parser.add_argument("--stage", dest="stages", nargs="+", action="extend", choices=PIPELINE, help="(default: all)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting to change first",
    )
    parser.add_argument("--force", action="store_true", help="run stages although nothing has changed")
    parser.add_argument("--promote", action="store_true", help="make the LoRA champion if it beats the present one")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    try:
        full(
            profile=options.profile,
            stages=options.stages,
            overrides=parse(options.overrides),
            force=options.force,
            promote=options.promote,
        )
    except (SpoError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
