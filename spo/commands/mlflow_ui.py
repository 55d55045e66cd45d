"""`python -m spo mlflow-ui`."""

import os
import sys
from pathlib import Path

from spo.errors import SpoError


def mlflow_ui(port: int = 5000) -> None:
    """Browse the tracked runs.

    This process becomes the server, which only this machine can reach.
    """
    from spo import tracking

    uri = tracking.store()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise SpoError(f"there are no runs at {uri} yet; run `python -m spo repro` first")
    if left := tracking.send_unsent():
        print(f"warning: {left} runs still wait in mlflow/unsent: {tracking.masked(uri)} is away", file=sys.stderr)
    if uri.startswith("http"):
        print(f"the runs are at {tracking.masked(uri)}")
        return
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    print(f"http://127.0.0.1:{port} (stop with Ctrl-C)", flush=True)
    server = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *server, "--backend-store-uri", uri])
