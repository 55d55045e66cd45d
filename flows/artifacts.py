"""What Prefect's UI shows of a run: outcomes of stages, verdict, figures, report and promotion."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from spo.runtime.text import flatten


def publish_stages(rows: Sequence[tuple[str, str, str, float]]) -> None:
    """rows: stage, its outcome, the outcomes of its items, seconds."""
    table = [
        {"stage": stage, "outcome": outcome, "items": items, "seconds": round(seconds, 1)}
        for stage, outcome, items, seconds in rows
    ]
    create_table_artifact(key="stages", table=table, description="What ran, and what has not changed")


def publish_report(profile: str, report: Path) -> None:
    """Show the report's verdict and figures with the run, and where its page is."""
    summary = (report / "summary.txt").read_text(encoding="utf-8").strip()
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    rows = "\n".join(f"| {name} | {_short(value)} |" for name, value in flatten(metrics).items())
    create_markdown_artifact(
        key="report",
        markdown=f"# Profile {profile}\n\n```\n{summary}\n```\n\n| metric | value |\n|---|---|\n{rows}\n",
        description=summary.partition("\n")[0],
    )
    page = (report / "report.html").resolve()
    create_link_artifact(key="report-page", link=page.as_uri(), link_text=str(page), description="The whole report")


def publish_promotion(decision: str) -> None:
    """Show whether the champion changed, with the reasons."""
    create_markdown_artifact(key="promotion", markdown=f"```\n{decision}\n```", description=decision.partition("\n")[0])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
