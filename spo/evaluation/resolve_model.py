"""Find the model that the user names: the base, or a LoRA by method, run, path, hub name or MLflow URI."""

import re
from dataclasses import dataclass
from pathlib import Path

from spo import tracking
from spo.config import Config
from spo.errors import ModelError
from spo.models.lora_file import PEFT_WEIGHTS, WEIGHTS
from spo.models.policy import WHOLE
from spo.runtime import hub
from spo.workspace import Workspace

BASE = "base"


@dataclass(frozen=True)
class Source:
    """The base if `lora` is None, else the base with that LoRA: a file, a folder or a hub repository."""

    name: str  # short, for labels and file names
    lora: str | Path | None
    description: str


def resolve_model(name: str | None, config: Config, root: Path = Path(), *, option: str = "--model") -> Source:
    """The model called `name`; None: the evaluated LoRA of the profile's first method, or else the base.

    ModelError with the known names, and the `option` that gave this one, if there is no such model.
    """
    evaluated = Workspace(config, root).loras
    if name == BASE:
        return Source(BASE, None, f"the base, {config.model.path}")
    if name is None:
        names = _evaluated(evaluated)
        if not names:
            missing = f"profile {config.profile} has no evaluated LoRA yet"
            return Source(BASE, None, f"the base, {config.model.path}: {missing}")
        name = next((name for name in config.methods if name in names), names[0])
        return _of_folder(name, evaluated / name)
    if name.strip() and _holds_lora(evaluated / name):
        return _of_folder(name, evaluated / name)
    if name.startswith("models:/"):
        return Source(_short(name.removeprefix("models:/")), lora_within(tracking.fetch_model(name, root)), name)
    if name in config.align:
        raise ModelError(f"{name} has no evaluated LoRA in {evaluated}; run `python -m spo evaluate` first")
    path = Path(name)
    if path.is_file():
        return Source(_short(path.stem), path, str(path))
    if name.strip() and path.is_dir():
        return _of_folder(_short(path.name), lora_within(path))
    if hub.is_name(name) and name.split("/")[0] not in ("runs", "models"):
        return Source(_short(name), name, f"{name} on the hub")
    raise ModelError(
        f"{option} {name!r} names nothing here; evaluated: {_evaluated(evaluated) or 'none'}; give one of them, "
        f"{BASE!r}, a run's folder, a LoRA's file or folder, OWNER/NAME on the hub, or models:/NAME@ALIAS"
    )


def lora_within(folder: Path) -> Path:
    """The folder of the one LoRA in `folder`; the latest of a training run's checkpoints. ModelError if unclear."""
    if _holds_lora(folder):
        return folder
    if checkpoints := sorted(folder.glob("checkpoints/step-*")):
        return checkpoints[-1]
    found = sorted(path.parent for path in folder.rglob(WEIGHTS) if "lora" in path.parts or "align" not in path.parts)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelError(f"{folder} holds no {WEIGHTS}; give a folder that has one")
    raise ModelError(f"{folder} holds {len(found)} LoRAs; name one of them, such as {found[0]}")


def _of_folder(name: str, folder: Path) -> Source:
    return Source(name, folder, f"{name}, the LoRA in {folder}")


def _evaluated(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if _holds_lora(path))


def _holds_lora(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, PEFT_WEIGHTS)) or any(
        (folder / name).is_dir() for name in WHOLE
    )


def _short(name: str) -> str:
    return re.sub(r"[^\w.@-]+", "-", name).strip("-") or "lora"
