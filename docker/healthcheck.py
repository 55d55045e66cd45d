"""Exit with 0 if the service of this container answers, else with 1 and the reason.

    python healthcheck.py [prefect-server|mlflow-server|worker]

Without a name it checks the service that entrypoint.sh started. A container that runs any other command is healthy as
long as it runs. The check asks the servers for rows of their database, because their own health pages answer without a
database, and MLflow's answers even if its list of allowed hosts rejects every client.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path


def ask(port: str, path: str, body: object = None, **headers: str) -> None:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=8):
        pass


def check(service: str) -> None:
    """Raise OSError if the service does not answer."""
    setting = os.environ.get
    match service:
        case "prefect-server":
            ask(setting("PREFECT_SERVER_API_PORT", "4200"), "/api/work_pools/filter", {"limit": 1})
        case "mlflow-server":
            host = setting("MLFLOW_SERVER_ALLOWED_HOSTS", "127.0.0.1").partition(",")[0]
            ask(setting("MLFLOW_PORT", "5000"), "/api/2.0/mlflow/experiments/search", {"max_results": 1}, Host=host)
        case "worker":
            ask(setting("PREFECT_WORKER_WEBSERVER_PORT", "8080"), "/health")


if __name__ == "__main__":
    started = Path(os.environ.get("SPO_SERVICE_FILE", "/tmp/spo-service"))
    try:
        check(sys.argv[1] if sys.argv[1:] else started.read_text(encoding="utf-8").strip())
    except OSError as error:
        sys.exit(f"unhealthy: {error}")
