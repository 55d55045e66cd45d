"""What a stage reports while it runs, and where: MLflow. Nothing else of ours imports it.

The store is MLFLOW_TRACKING_URI, or else the project's own: mlflow/mlflow.db and mlflow/artifacts. A stage is one
run; the stages of one pipeline run hang under one parent run, known by the tag `spo.pipeline`.
"""

import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
from filelock import FileLock

from spo.config import Config
from spo.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

PIPELINE_RUN = "SPO_PIPELINE_RUN"  # environment variable: names the pipeline run that the stages belong to
SECONDS_BETWEEN_SENDS = 10.0
METRICS_PER_SEND = 1000  # MLflow's limits
PARAMS_PER_SEND = 100


class Tracker(Protocol):
    """Where a stage reports to; what cannot be reported is said once and never ends a stage."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings; nested ones get dotted names."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers at a step; nested ones get dotted names, and what is no number is left out."""

    def log_image(self, name: str, image: "Image") -> None:
        """A picture, as <name>.png."""

    def log_text(self, name: str, text: str) -> None:
        """A text file called `name`."""

    def log_artifact(self, path: Path) -> None:
        """A file or folder that exists."""


class NullTracker:
    """Reports nothing: for tests, and for all processes of a distributed run but the first."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        pass

    def log_image(self, name: str, image: "Image") -> None:
        pass

    def log_text(self, name: str, text: str) -> None:
        pass

    def log_artifact(self, path: Path) -> None:
        pass


class MlflowTracker:
    """Reports to one MLflow run; metrics are gathered and sent every ten seconds, so that logging costs little."""

    def __init__(self, client: "MlflowClient", run_id: str):
        self.run_id = run_id
        self._client = client
        self._metrics: list[Any] = []
        self._last_send = time.monotonic()
        self._complained = False

    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(_clean(name), str(value)) for name, value in flatten(params).items()]
        for start in range(0, len(rows), PARAMS_PER_SEND):
            self._try(self._client.log_batch, self.run_id, params=rows[start : start + PARAMS_PER_SEND])

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, value in flatten(metrics).items():
            if isinstance(value, str | None):
                continue
            self._metrics.append(Metric(_clean(name), float(value), now, step or 0))
        if time.monotonic() - self._last_send >= SECONDS_BETWEEN_SENDS:
            self.send()

    def log_image(self, name: str, image: "Image") -> None:
        self._try(self._client.log_image, self.run_id, image, artifact_file=f"{name}.png")

    def log_text(self, name: str, text: str) -> None:
        self._try(self._client.log_text, self.run_id, text, name)

    def log_artifact(self, path: Path) -> None:
        self._try(self._client.log_artifact, self.run_id, str(path))

    def send(self) -> None:
        """Send what has been gathered; what the store does not take is lost."""
        rows, self._metrics = self._metrics, []
        for start in range(0, len(rows), METRICS_PER_SEND):
            self._try(self._client.log_batch, self.run_id, metrics=rows[start : start + METRICS_PER_SEND])
        self._last_send = time.monotonic()

    def _try(self, call: Any, *arguments: Any, **options: Any) -> None:
        from mlflow.exceptions import MlflowException

        try:
            call(*arguments, **options)
        except (MlflowException, OSError) as error:
            if not self._complained:
                print(f"warning: tracking lost something: {_one_line(error)}", file=sys.stderr, flush=True)
            self._complained = True


@contextmanager
def start(
    config: Config, stage: str, root: Path = Path(), *, method: str | None = None, seed: int | None = None
) -> Iterator[Tracker]:
    """A tracker for one stage's run, which ends FAILED where the block raises, or is killed by the keyboard.

    ConfigError where the store cannot be used.
    """
    if int(os.environ.get("RANK", "0")):  # of a distributed run, the first process alone reports
        yield NullTracker()
        return
    client, experiment, parent = _open(config, root)
    name = " ".join(part for part in (stage, method, None if seed is None else f"seed {seed}") if part)
    tags = {"mlflow.parentRunId": parent, **_tags(config, stage, root)}
    tags |= {key: str(value) for key, value in {"method": method, "seed": seed}.items() if value is not None}
    tracker = MlflowTracker(client, client.create_run(experiment, tags=tags, run_name=name).info.run_id)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    finally:
        tracker.send()
        for run_id in (tracker.run_id, parent):  # a parent run is as its latest stage
            tracker._try(client.set_terminated, run_id, status)


def store(root: Path = Path()) -> str:
    """The URI that runs are tracked at."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlflow' / 'mlflow.db'}"


def fetch_model(uri: str, root: Path = Path()) -> Path:
    """The local folder of a registered model, models:/NAME@ALIAS or models:/NAME/VERSION; or a ModelError."""
    _client(root)
    import mlflow
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(store(root))  # else mlflow makes an empty store in the current folder
    try:
        return Path(download_artifacts(artifact_uri=uri, tracking_uri=store(root), registry_uri=store(root)))
    except (MlflowException, OSError) as error:
        raise ModelError(
            f"{uri} cannot be had from {store(root)}: {_one_line(error)}; it should be models:/NAME@ALIAS or "
            "models:/NAME/VERSION of a registered model (`make ui` shows them)"
        ) from None


def pipeline_id() -> str:
    """Names the pipeline run that this process belongs to: SPO_PIPELINE_RUN, or else the dvc or process above it."""
    if named := os.environ.get(PIPELINE_RUN):
        return named
    above = psutil.Process().parents()
    chosen = next((process for process in above if _is_dvc(process)), above[0] if above else psutil.Process())
    return f"{platform.node()}-{chosen.pid}-{chosen.create_time():.0f}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _open(config: Config, root: Path) -> tuple["MlflowClient", str, str]:
    """Client, experiment and parent run, made where missing; one process at a time, for an empty database's sake."""
    from mlflow.exceptions import MlflowException

    folder = root.resolve() / "mlflow"
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / ".lock"):
            client = _client(root)
            experiment = _experiment(client, _experiment_name(config), folder / "artifacts")
            pipeline = pipeline_id()
            parent = _find_parent(client, experiment, pipeline)
            if parent is None:
                tags = {"spo.pipeline": pipeline, "profile": config.profile}
                name = f"{config.profile} {time.strftime('%Y-%m-%d %H:%M')}"
                parent = client.create_run(experiment, tags=tags, run_name=name).info.run_id
            client.update_run(parent, status="RUNNING")
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"cannot track at {store(root)}: {_one_line(error)}; mend or unset MLFLOW_TRACKING_URI"
        ) from error
    return client, experiment, parent


def _client(root: Path) -> "MlflowClient":
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # a server that is away should not hold up a training run for long
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store(root))


def _experiment_name(config: Config) -> str:
    return f"spo-{config.profile}"


def _experiment(client: "MlflowClient", name: str, artifacts: Path) -> str:
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    own = "MLFLOW_TRACKING_URI" not in os.environ
    return client.create_experiment(name, artifact_location=(artifacts / name).as_uri() if own else None)


def _find_parent(client: "MlflowClient", experiment: str, pipeline: str) -> str | None:
    found = client.search_runs([experiment], f"tags.`spo.pipeline` = '{pipeline}'", max_results=1)
    return found[0].info.run_id if found else None


def _tags(config: Config, stage: str, root: Path) -> dict[str, str]:
    import diffusers
    import torch

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    cuda = torch.cuda.is_available()
    return {
        "stage": stage,
        "profile": config.profile,
        "mlflow.source.git.commit": git.stdout.strip() or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores",
    }


def _is_dvc(process: psutil.Process) -> bool:
    try:
        return any(Path(part).name == "dvc" for part in process.cmdline()[:3])
    except psutil.Error:
        return False


def _clean(name: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
