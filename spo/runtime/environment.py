"""Versions, commit and machine that results are made with."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from spo.errors import SpoError

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "mlflow", "prefect", "dvc")


def environment(root: Path) -> dict[str, str]:
    """Names and values needed to repeat a run."""
    facts = {"commit": git_commit(root), **hardware(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def git_commit(root: Path) -> str:
    """The commit of `root`, and whether files differ from it; "not in a git repository" if there is none."""
    commit = git(root, "rev-parse", "HEAD")
    if not commit:
        return "not in a git repository"
    return f"{commit[:12]}, with uncommitted changes" if git(root, "status", "--porcelain") else commit[:12]


def hardware() -> dict[str, str]:
    """`processor`, and `gpu` if there are any; the last digits of a result depend on them."""
    import torch

    kernels = torch.backends.cpu.get_cpu_capability()  # the instruction set that torch's own kernels use
    facts = {"processor": f"{processor()}, {os.cpu_count()} cores, {kernels}, {platform.system()}"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["gpu"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return facts


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model, or its architecture if the system does not name the model."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in names if name), platform.machine())


def git(root: Path, *arguments: str) -> str:
    """The output of a git command; empty without git, a repository or an answer within 30 s."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def require_repository(root: Path) -> None:
    """SpoError where DVC would look for git in vain, as in a downloaded archive."""
    within = any((folder / ".git").exists() for folder in (root.resolve(), *root.resolve().parents))
    settings = (root / ".dvc" / name for name in ("config", "config.local"))
    no_scm = re.compile(r"^\s*no_scm\s*=\s*true\s*$", re.MULTILINE | re.IGNORECASE)
    if not within and not any(file.is_file() and no_scm.search(file.read_text()) for file in settings):
        raise SpoError(
            f"{root.resolve()} is in no git repository, which DVC needs; run `dvc config core.no_scm true` to do "
            "without, or `git init`"
        )
