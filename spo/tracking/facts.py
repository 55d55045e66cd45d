"""What a run was made with: commit, versions, machine, the Prefect run around it, and its data with their hashes."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from spo.config import Config
from spo.environment import hardware

FLOW_RUN = "SPO_FLOW_RUN"  # environment variable: the Prefect flow run that started the stage
DIGEST_LENGTH = 32  # hexadecimal digits of a SHA-256; MLflow takes 36 at most


def tags(config: Config, stage: str, root: Path) -> dict[str, str]:
    """Of a stage's run."""
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
    """The state of the project, and who ran it: of a stage's run, of its parent and of a registered model."""
    commit = _git(root, "rev-parse", "HEAD")
    lock = root / "dvc.lock"
    flow = os.environ.get(FLOW_RUN)
    return {
        "mlflow.source.git.commit": commit or "none",
        "git.changed": str(bool(_git(root, "status", "--porcelain", "--untracked-files=no"))) if commit else "none",
        "dvc.lock": content_digest(lock) if lock.is_file() else "none",
        **({"prefect.flow_run_id": flow} if flow else {}),
    }


def inputs(config: Config, stage: str, root: Path) -> list[dict[str, Any]]:
    """The data sets that a stage reads, each with the hash of what it holds; a hub's data set by its name."""
    prepared, preferences = config.folder("prepare"), config.prepare.preferences
    of_stage: dict[str, dict[str, tuple[str | Path, str]]] = {
        "prepare": {
            "prompts": (config.prepare.prompts.source, "source"),
            **({"preferences": (preferences.source, "source")} if preferences else {}),
        },
        "train_preference": {
            "preferences train": (prepared / "preferences" / "train.parquet", "training"),
            "preferences validation": (prepared / "preferences" / "validation.parquet", "validation"),
        },
        "align": {"prompts train": (prepared / "prompts" / "train.txt", "training")},
        "evaluate": {
            "prompts validation": (prepared / "prompts" / "validation.txt", "validation"),
            "prompts test": (prepared / "prompts" / "test.txt", "testing"),
        },
    }
    return [
        {"name": name, "context": context, "source": str(source), **_content(root, str(source))}
        for name, (source, context) in of_stage.get(stage, {}).items()
        if (root / source).exists() or ":" in str(source)
    ]


def content_digest(path: Path) -> str:
    """Of a file's bytes, or of a folder's files with their names; the start of a SHA-256."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    else:
        for inner in sorted(each for each in path.rglob("*") if each.is_file()):
            digest.update(f"{inner.relative_to(path).as_posix()}\0{content_digest(inner)}\n".encode())
    return digest.hexdigest()[:DIGEST_LENGTH]


def _content(root: Path, source: str) -> dict[str, Any]:
    path = root / source
    if not path.exists():
        return {"digest": hashlib.sha256(source.encode()).hexdigest()[:DIGEST_LENGTH], "profile": {}}
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    profile = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    return {"digest": content_digest(path), "profile": profile}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()
