"""One DVC stage as one Prefect task. DVC decides what has to run; Prefect shows it, and ends it when told to."""

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

SAYS = {  # what DVC says of an item, and what became of it
    "Completed": re.compile(r"Running stage '(.+)':"),
    "Restored": re.compile(r"Stage '(.+)' is cached - skipping run"),
    "UpToDate": re.compile(r"Stage '(.+)' didn't change, skipping"),
}
TRACKED = re.compile(r"tracked at (\S+)")


@task(name="stage", task_run_name="{stage}", cache_policy=NO_CACHE, retries=0)
def run_stage(stage: Stage, *, force: bool = False) -> State:
    """Let DVC bring `stage` up to date; a matrix stage's name stands for all of its items.

    The state is named Completed (something ran), Restored (DVC had its outputs from an earlier run) or UpToDate
    (nothing had changed); its message says so of each item. Call it directly: a submitted task cannot be ended.
    RuntimeError with the last lines of the output where the stage fails.
    """
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *(["--force"] if force else []), stage]
    items: dict[str, str] = {}
    with closing(logged(command, name=f"stage {stage}")) as lines:
        for line in lines:
            for outcome, pattern in SAYS.items():
                if said := pattern.match(line):
                    items[said[1]] = outcome
            if tracked := TRACKED.match(line):
                create_link_artifact(key="mlflow-run", link=tracked[1], description="The pipeline run in MLflow")
    outcome = next((name for name in SAYS if name in items.values()), "UpToDate")
    return Completed(name=outcome, message=", ".join(f"{item}: {became}" for item, became in items.items()) or None)


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE, retries=0)
def promote_released() -> str:
    """Let the evaluated LoRA be champion if it has earned it; what was decided, and why."""
    command = [sys.executable, "-m", "spo", "promote"]
    with closing(logged(command, name="promote")) as lines:
        return "\n".join(lines)
