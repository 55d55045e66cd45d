"""The store that runs are tracked in: the project's own SQLite file, or the server of MLFLOW_TRACKING_URI."""

import logging
import os
import platform
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock

from spo.errors import ConfigError, ModelError, one_line
from spo.runtime.files import read_json, write_json
from spo.tracking.moved import follow_move

if TYPE_CHECKING:
    from mlflow import MlflowClient

PIPELINE_RUN = "SPO_PIPELINE_RUN"  # environment variable: names the pipeline run that the stages belong to
REFUSALS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_CONFLICT",
    "RESOURCE_DOES_NOT_EXIST",
}


def store(root: Path = Path()) -> str:
    """The URI of the store; a local one's is relative where its folder's name holds what a URI reads differently."""
    path = str(database(root))
    local = os.path.relpath(path) if set("%?") & set(path) else path
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{local}"


def database(root: Path = Path()) -> Path:
    """The project's own database."""
    return root.resolve() / "mlflow" / "mlflow.db"


def connect(root: Path) -> "MlflowClient":
    """A client of the store; ConfigError if the URI is unknown or a local store cannot be opened."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the journal keeps what an unreachable server does not receive
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _exclusive(root):
            named = "MLFLOW_TRACKING_URI" in os.environ
            if not named:
                follow_move(database(root), root.resolve().as_uri())
            mlflow.set_tracking_uri(store(root))  # some of mlflow's own code ignores the client's URI
            if not named:  # mlflow also sets the variable, which should be set by the user alone
                os.environ.pop("MLFLOW_TRACKING_URI", None)
            return MlflowClient(tracking_uri=store(root), registry_uri=store(root))
    except (MlflowException, SQLAlchemyError, sqlite3.Error, ImportError, OSError, ValueError) as error:
        raise unusable(root, error) from error


def make_parent_run(
    client: "MlflowClient", root: Path, experiment: str, pipeline: str, profile: str
) -> tuple[str, str]:
    """Return the ids of the experiment and of the pipeline's parent run; make missing ones, one process at a time."""
    with _exclusive(root):
        if found := client.get_experiment_by_name(experiment):
            experiment_id = found.experiment_id
        else:
            location = (root.resolve() / "mlflow" / "artifacts" / experiment).as_uri()
            own = "MLFLOW_TRACKING_URI" not in os.environ
            experiment_id = client.create_experiment(experiment, artifact_location=location if own else None)
        parent = find_run(client, experiment_id, "spo.pipeline", pipeline)
        if parent is None:
            tags = {"spo.pipeline": pipeline, "profile": profile}
            name = f"{profile} {time.strftime('%Y-%m-%d %H:%M')}"
            parent = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    return experiment_id, parent


def find_run(client: "MlflowClient", experiment: str, tag: str, value: str) -> str | None:
    """The id of the run that has the tag; None if there is none."""
    found = client.search_runs([experiment], f"tags.`{tag}` = '{value}'", max_results=1)
    return found[0].info.run_id if found else None


def fetch_model(uri: str, root: Path = Path()) -> Path:
    """The local folder of a registered model, models:/NAME@ALIAS or models:/NAME/VERSION; or a ModelError."""
    connect(root)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return Path(download_artifacts(artifact_uri=uri, tracking_uri=store(root), registry_uri=store(root)))
    except (MlflowException, OSError) as error:
        raise ModelError(
            f"{uri} cannot be loaded from {masked(store(root))}: {masked_line(error)}; it should be "
            "models:/NAME@ALIAS or models:/NAME/VERSION of a registered model (`make ui` shows them)"
        ) from None


def run_url(root: Path, experiment: str, run_id: str) -> str | None:
    """The address that shows a run in a browser; None with a local store that no `mlflow-ui` is showing."""
    uri = masked(store(root))
    server = uri.rstrip("/") if uri.startswith("http") else _ui(root)
    return server and f"{server}/#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"


def note_ui(port: int, root: Path = Path()) -> None:
    """Note that this process is about to show the local store on `port`."""
    own = psutil.Process()
    write_json(_ui_file(root), {"store": masked(store(root)), "port": port, "pid": own.pid, "since": own.create_time()})


def _ui(root: Path) -> str | None:
    """The address of the `mlflow-ui` that shows this local store; of a copied checkout it is not the original's."""
    try:
        noted = read_json(_ui_file(root))
        alive = psutil.Process(noted["pid"]).create_time() == noted["since"]
        return f"http://127.0.0.1:{noted['port']}" if alive and noted["store"] == masked(store(root)) else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def _ui_file(root: Path) -> Path:
    return root.resolve() / "mlflow" / "ui.json"


def refused(error: Exception) -> bool:
    """Whether the store has refused the request, so that sending it again is useless."""
    return getattr(error, "error_code", None) in REFUSALS


def is_temporary(root: Path, error: Exception) -> bool:
    """Whether waiting may help: with an unreachable server, but not with a local store or a wrong address."""
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return store(root).startswith("http") and (status >= 500 or status in (408, 429))


def unusable(root: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot track at {masked(store(root))}: {masked_line(error)}; correct or unset MLFLOW_TRACKING_URI"
    )


@contextmanager
def store_errors(root: Path = Path()) -> Iterator[None]:
    """Turn the store's errors in the block into a ConfigError of one line."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise unusable(root, error) from error


def pipeline_id() -> str:
    """The pipeline run of this process: SPO_PIPELINE_RUN, or else an id of its parent process, of dvc if it is one."""
    if named := os.environ.get(PIPELINE_RUN):
        return named
    parents = psutil.Process().parents()
    chosen = next(filter(_is_dvc, parents), parents[0] if parents else psutil.Process())
    return f"{platform.node()}-{chosen.pid}-{chosen.create_time():.0f}"


def masked_line(error: Exception) -> str:
    """An error's message in one line, without passwords."""
    return one_line(masked(str(error)) or type(error).__name__)


def masked(text: str) -> str:
    """The text without the user and password of each address in it."""
    return re.sub(r"(\w://)[^/@\s]+@", r"\1***@", text)


def _exclusive(root: Path) -> FileLock:
    """A lock: several processes must not initialise an empty database at once."""
    folder = root.resolve() / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock")


def _is_dvc(process: psutil.Process) -> bool:
    try:
        return any(Path(part).name == "dvc" for part in process.cmdline()[:3])
    except psutil.Error:
        return False
