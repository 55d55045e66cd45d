"""The pipeline as the flow `spo`: its stages in order, then the report as artifacts of the run.

    python -m flows.full [--profile P] [--stage S ...] [--force]

runs it from the project's folder without a server; `prefect.yaml` deploys it. The project is the current folder.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.profile import use_profile
from flows.stages import STAGES, Stage, run_stage
from spo.errors import SpoError


@flow(name="spo", retries=0)
def full(profile: str | None = None, stages: list[Stage] | None = None, force: bool = False) -> dict[str, str]:
    """Run the pipeline's stages, all of them or those named, always in the pipeline's order.

    profile: one of configs/*.yaml, written to params.yaml; None runs the one that stands there.
    force: run stages although nothing has changed.
    Returns what became of each stage: Completed, Restored or UpToDate.
    """
    name = use_profile(profile)
    chosen = [stage for stage in STAGES if stages is None or stage in stages]
    outcomes = {str(stage): str(run_stage(stage, force=force).name) for stage in chosen}
    if "report" in outcomes:
        publish_report(name, Path("runs") / name / "report")
    return outcomes


def publish_report(profile: str, folder: Path) -> None:
    """Show the report's summary and headline figures with the run, and where its page lies."""
    summary = (folder / "summary.txt").read_text(encoding="utf-8").strip()
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    rows = "\n".join(f"| {name} | {value} |" for name, value in _flat(metrics))
    create_markdown_artifact(
        key="report",
        markdown=f"# Profile {profile}\n\n```\n{summary}\n```\n\n| metric | value |\n|---|---|\n{rows}\n",
        description=f"Headline figures of profile {profile}",
    )
    page = (folder / "report.html").resolve()
    create_link_artifact(key="report-page", link=page.as_uri(), link_text=str(page), description="The whole report")


def _flat(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested metrics as (dotted name, value) rows; numbers to four significant figures."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.full", description="Run the pipeline as a Prefect flow.")
    parser.add_argument("--profile", help="one of configs/*.yaml, written to params.yaml (default: the one there)")
    parser.add_argument("--stage", dest="stages", nargs="+", action="extend", choices=STAGES, help="(default: all)")
    parser.add_argument("--force", action="store_true", help="run stages although nothing has changed")
    options = parser.parse_args(arguments)
    try:
        full(profile=options.profile, stages=options.stages, force=options.force)
    except (SpoError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
