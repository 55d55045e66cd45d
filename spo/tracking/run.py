"""One stage's run, from its start in the journal to its end in the store, with the facts that it is tagged with."""

import getpass
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spo.config import Config
from spo.pipeline import STAGES
from spo.runtime.environment import git, hardware
from spo.runtime.hashing import content_digest, text_digest
from spo.tracking.heartbeat import Heartbeat
from spo.tracking.journal import Journal, unsent
from spo.tracking.sender import Sender, send_unsent
from spo.tracking.store import connect, is_temporary, masked, pipeline_id, run_url, store, unusable
from spo.tracking.tracker import JournalTracker, NullTracker, Tracker
from spo.workspace import Workspace

FLOW_RUN = "SPO_FLOW_RUN"  # environment variable: the Prefect flow run that started the stage
CONTEXTS = {"train": "training", "validation": "validation", "test": "testing"}  # names that MLflow uses
STOPPED_SECONDS = 5.0  # a stopped stage waits this long for a server that hangs, twice


@contextmanager
def start(
    config: Config, stage: str, root: Path = Path(), *, name: str | None = None, seed: int | None = None
) -> Iterator[Tracker]:
    """A tracker for one stage's run. The run is FAILED if the block raises or is interrupted.

    An unreachable server does not stop a stage: a later stage sends its journal. ConfigError if the store is unusable.
    """
    if int(os.environ.get("RANK", "0")):  # only the first process of a distributed run reports
        yield NullTracker()
        return
    client = connect(root)
    journal = Journal.create(unsent(root))
    tracker, sender = JournalTracker(journal), Sender(client, journal, root)
    journal.append(
        "start",
        experiment=experiment_name(config),
        pipeline=pipeline_id(),
        profile=config.profile,
        name=" ".join(part for part in (stage, name, None if seed is None else f"seed {seed}") if part),
        tags=tags(config, stage, root)
        | {key: str(value) for key, value in {STAGES[stage].item: name, "seed": seed}.items() if value is not None},
        parent_tags=provenance(root),
        time=_now(),
    )
    if sender.send():
        url = run_url(root, sender.state["experiment"], sender.state["parent"])
        print(f"tracked at {url}" if url else f"tracked in {masked(store(root))}; `make ui` shows it", flush=True)
        tracker.address = url or f"run {sender.state['parent']} of {experiment_name(config)}; `make ui` shows it"
        send_unsent(root)
    elif (problem := sender.problem) is not None and not is_temporary(root, problem):
        journal.remove()
        raise unusable(root, problem) from problem
    journal.append("inputs", inputs=inputs(config, stage, root))
    heartbeat = Heartbeat(tracker, sender)
    heartbeat.start()
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    finally:
        patience = STOPPED_SECONDS if isinstance(sys.exception(), KeyboardInterrupt) else None
        heartbeat.stop(patience)
        journal.append("end", status=status, time=_now())
        if sender.send_within(patience):
            journal.remove()
        else:
            journal.release()
            print(
                f"warning: not all of {stage} could be tracked; the rest is kept in {journal.folder} and sent when "
                "the next stage starts or by `python -m spo mlflow-ui`",
                file=sys.stderr,
                flush=True,
            )


def experiment_name(config: Config) -> str:
    return f"spo-{config.profile}"


def tags(config: Config, stage: str, root: Path) -> dict[str, str]:
    """The tags of a stage's run."""
    import torch

    return {
        "mlflow.note.content": STAGES[stage].help,
        "stage": stage,
        "profile": config.profile,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        **hardware(),
        **provenance(root),
    }


def provenance(root: Path) -> dict[str, str]:
    """Tags of a stage's run, its parent and a registered model: the project's state, and the flow run."""
    commit = git(root, "rev-parse", "HEAD")
    lock = root / "dvc.lock"
    flow = os.environ.get(FLOW_RUN)
    return {
        "mlflow.source.name": "python -m spo",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
        "mlflow.source.git.commit": commit or "none",
        "git.changed": str(bool(git(root, "status", "--porcelain", "--untracked-files=no"))) if commit else "none",
        "dvc.lock": content_digest(lock) if lock.is_file() else "none",
        **({"prefect.flow_run_id": flow} if flow else {}),
    }


def inputs(config: Config, stage: str, root: Path) -> list[dict[str, Any]]:
    """The data sets that a stage reads, each with a hash of its contents; for a data set of the hub, of its name."""
    prepared = Workspace(config).prepared
    found = [(f"{kind} {side}", str(prepared.file(kind, side)), CONTEXTS[side]) for kind, side in STAGES[stage].inputs]
    if stage == "prepare":
        found = [("prompts", config.prepare.prompts.source, "source")]
        if config.prepare.preferences:
            found.append(("preferences", config.prepare.preferences.source, "source"))
    return [
        {"name": name, "context": context, "source": source, **_content(root, source)}
        for name, source, context in found
        if (root / source).exists() or ":" in source
    ]


def _content(root: Path, source: str) -> dict[str, Any]:
    path = root / source
    if not path.exists():
        return {"digest": text_digest(source), "profile": {}}
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    profile = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    return {"digest": content_digest(path), "profile": profile}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())


def _now() -> int:
    return int(time.time() * 1000)
