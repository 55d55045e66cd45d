"""One DVC stage as one Prefect task. DVC decides what has to run; Prefect shows it and can cancel it."""

import re
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Literal

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows.process import logged
from spo.pipeline import PIPELINE

if TYPE_CHECKING:
    Stage = str
else:
    Stage = Literal[*PIPELINE]  # Prefect checks a parameter against these names

OUTCOMES = {  # outcome of an item, and the line in which DVC reports it
    "Completed": re.compile(r"Running stage '(.+)':"),
    "Restored": re.compile(r"Stage '(.+)' is cached - skipping run"),
    "UpToDate": re.compile(r"Stage '(.+)' didn't change, skipping"),
}
TRACKED = re.compile(r"tracked at (\S+)")


def artifact_key(what: str, profile: str) -> str:
    """Each profile has its own history of an artifact; Prefect takes lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{what}-{profile}".lower()).strip("-")


@task(name="preflight", task_run_name="preflight", cache_policy=NO_CACHE, retries=0)
def preflight(stages: list[Stage]) -> None:
    """Look for the files, models and room on the disk that the stages need; RuntimeError if something is missing.

    DVC removes a stage's outputs before it starts the stage, so this comes first.
    """
    options = [part for stage in stages for part in ("--stage", stage)]
    with closing(logged([sys.executable, "-m", "spo", "check", "--quick", *options], name="preflight")) as lines:
        for _ in lines:
            pass


@task(name="stage", task_run_name="{stage}", cache_policy=NO_CACHE, retries=0)
def run_stage(stage: Stage, *, profile: str, force: bool = False) -> State:
    """Let DVC bring `stage` up to date; the name of a matrix stage means all of its items.

    The state is named Completed (something ran), Restored (DVC has its outputs from an earlier run) or UpToDate
    (nothing has changed); its message has the outcome of each item. Call it directly: a submitted task cannot be
    cancelled. RuntimeError with the last lines of the output where the stage fails.
    """
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *(["--force"] if force else []), stage]
    items: dict[str, str] = {}
    with closing(logged(command, name=f"stage {stage}")) as lines:
        for line in lines:
            for outcome, pattern in OUTCOMES.items():
                if match := pattern.match(line):
                    items[match[1]] = outcome
            if tracked := TRACKED.match(line):
                show_links(stage, profile, tracked[1])
    outcome = next((name for name in OUTCOMES if name in items.values()), "UpToDate")
    return Completed(name=outcome, message=", ".join(f"{item}: {result}" for item, result in items.items()) or None)


def show_links(stage: str, profile: str, run: str) -> None:
    """Link the pipeline's run in MLflow, and MLflow's copy of the report if this stage makes it."""
    key = artifact_key("mlflow-run", profile)
    create_link_artifact(key=key, link=run, description="The pipeline run in MLflow")
    if stage == PIPELINE[-1]:
        page, _, query = run.partition("?")
        link = f"{page}/artifacts/report.html?{query}"
        create_link_artifact(key=artifact_key("report-page", profile), link=link, description="The whole report")


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE, retries=0)
def promote_released() -> str:
    """Make the evaluated LoRA champion if it beats the present one; returns the decision with its reasons."""
    command = [sys.executable, "-m", "spo", "promote"]
    with closing(logged(command, name="promote")) as lines:
        return "\n".join(lines)
