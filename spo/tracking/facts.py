"""Facts about a run: commit, versions, machine, the Prefect run around it, and its data with their hashes."""

import os
import platform
from pathlib import Path
from typing import Any

from spo.config import Config
from spo.pipeline import STAGES
from spo.runtime.environment import git, hardware
from spo.runtime.hashing import content_digest, text_digest
from spo.workspace import Workspace

FLOW_RUN = "SPO_FLOW_RUN"  # environment variable: the Prefect flow run that started the stage
CONTEXTS = {"train": "training", "validation": "validation", "test": "testing"}  # names that MLflow uses


def tags(config: Config, stage: str, root: Path) -> dict[str, str]:
    """The tags of a stage's run."""
    import diffusers
    import torch

    return {
        "stage": stage,
        "profile": config.profile,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **hardware(),
        **provenance(root),
    }


def provenance(root: Path) -> dict[str, str]:
    """Tags of a stage's run, its parent and a registered model: the project's state, and the flow run."""
    commit = git(root, "rev-parse", "HEAD")
    lock = root / "dvc.lock"
    flow = os.environ.get(FLOW_RUN)
    return {
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
