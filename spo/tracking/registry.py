"""Aligned LoRAs as versions of a registered model, `spo-<profile>-lora`; the alias `champion` is on one of them.

A version is an MLflow model of the diffusers flavour, which `mlflow.diffusers.load_model` and `mlflow.pyfunc` load; its
folder also has evaluation/, with the tables and the report of its evaluation.
"""

import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import Config
from spo.runtime.hashing import content_digest
from spo.tracking.run import experiment_name, provenance
from spo.tracking.store import connect, make_parent_run, pipeline_id

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

CHAMPION = "champion"
REQUIREMENTS = ("accelerate", "diffusers", "peft", "safetensors", "torch", "transformers")


@dataclass(frozen=True)
class Version:
    """One registered LoRA."""

    name: str
    number: int
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"

    @property
    def description(self) -> str:
        return f"version {self.number} ({self.tags.get('method', '?')})"


def model_name(config: Config) -> str:
    return f"spo-{config.profile}-lora"


def champion(config: Config, root: Path = Path()) -> Version | None:
    """The version that has the alias `champion`; None if there is none."""
    from mlflow.exceptions import MlflowException

    client = connect(root)
    try:
        return _version(client.get_model_version_by_alias(model_name(config), CHAMPION))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model; no such alias
            return None
        raise


def make_champion(version: Version, root: Path = Path()) -> None:
    """Move the alias `champion` to this version."""
    connect(root).set_registered_model_alias(version.name, CHAMPION, str(version.number))


def describe(version: Version, root: Path = Path(), *, tags: Mapping[str, str], description: str) -> None:
    """Replace tags and the description of a version."""
    client = connect(root)
    for key, value in tags.items():
        client.set_model_version_tag(version.name, str(version.number), key, value)
    client.update_model_version(version.name, str(version.number), description)


def register(
    config: Config, lora: Path, evaluation: Sequence[Path], root: Path = Path(), *, tags: Mapping[str, str]
) -> Version:
    """Return the version of this LoRA with this evaluation; make it if there is none.

    lora: a folder with diffusers' pytorch_lora_weights.safetensors. evaluation: files that are stored with it.
    """
    client = connect(root)
    name = model_name(config)
    known = {"spo.digest": content_digest(lora), **tags}
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(
            name, description=f"LoRAs of profile {config.profile}, aligned by SPO and others"
        )
    for found in client.search_model_versions(f"name = '{name}'"):
        if known.items() <= found.tags.items():
            return _version(found)
    experiment, _ = make_parent_run(client, root, experiment_name(config), pipeline_id(), config.profile)
    finished = client.search_runs(
        [experiment],
        "tags.stage = 'evaluate' AND attributes.status = 'FINISHED'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    run_id = finished[0].info.run_id if finished else None
    model = client.create_logged_model(experiment, f"{config.profile}-lora", run_id, known, model_type="lora")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        _save(config, lora, folder, root)
        (folder / "evaluation").mkdir()
        for file in evaluation:
            shutil.copyfile(file, folder / "evaluation" / file.name)
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    tags = {**known, **provenance(root)}
    source = f"models:/{model.model_id}"
    return _version(client.create_model_version(name, source, run_id, tags=tags, model_id=model.model_id))


def _save(config: Config, lora: Path, folder: Path, root: Path) -> None:
    """Save in MLflow's diffusers flavour; a base in the project gets a relative path, so that both can move."""
    base = config.model.path
    if (root / base).is_dir() and not Path(base).is_absolute():
        base = f"./{base.removeprefix('./')}"
    weights = lora / "pytorch_lora_weights.safetensors"
    requirements = [f"{package}=={installed(package).partition('+')[0]}" for package in REQUIREMENTS]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of type hints in mlflow itself
        from mlflow.diffusers import save_model

        save_model(str(weights), str(folder), base, signature=_signature(config), pip_requirements=requirements)


def _signature(config: Config) -> "ModelSignature":
    """Prompts to PNG bytes, at the resolution and with the sampler's settings of the profile's evaluation."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    sampler = config.evaluate.samplers[config.evaluate.deciding]
    defaults: dict[str, tuple[DataType, Any]] = {
        "num_inference_steps": (DataType.integer, sampler.steps),
        "guidance_scale": (DataType.double, sampler.guidance_scale),
        "height": (DataType.integer, config.model.size[0]),
        "width": (DataType.integer, config.model.size[1]),
        "negative_prompt": (DataType.string, ""),
    }
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema([ParamSpec(name, kind, default) for name, (kind, default) in defaults.items()]),
    )


def _version(found: "ModelVersion") -> Version:
    return Version(found.name, int(found.version), dict(found.tags))
