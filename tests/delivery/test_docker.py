"""The images and the deployment: linted, and the scripts of every step run as a container would run them."""

import os
import re
import signal
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.delivery.conftest import ROOT, environment, shell
from tests.delivery.test_retrain import FILES

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = (DOCKER / "compose.yaml").read_text()
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
START_SECONDS = 900.0  # about 10 on an idle machine


def services() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE)["services"]


def test_the_dockerfile_passes_its_linter() -> None:
    shell("hadolint docker/Dockerfile", ROOT)


def test_the_deployment_follows_compose_s_schema() -> None:
    shell("check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml", ROOT)


def test_images_are_pinned_by_digest_and_run_as_no_root() -> None:
    pulled = [service["image"] for service in services().values() if "build" not in service]
    pulled += re.findall(r"^FROM (\S+:\S+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert len(pulled) == 3
    for image in pulled:
        assert re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", image), image
    stages = (DOCKER / "Dockerfile").read_text().split("\nFROM ")
    built = {stage.splitlines()[0].split(" AS ")[1]: stage for stage in stages if " AS " in stage.splitlines()[0]}
    for service in services().values():
        if "build" in service:
            assert "USER 1000:1000" in built[service["build"]["target"]]


def test_ports_are_on_the_loopback_alone() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_no_container_fills_the_disk_with_its_log_or_takes_all_memory() -> None:
    for name, service in services().items():
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
        assert service["mem_limit"], name


def test_the_images_that_run_the_pipeline_have_a_compiler_for_torch_compile() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    starts_from = {name: start for start, name, _ in stages}
    assert starts_from["cpu"] == starts_from["cuda"]
    [text] = [text for _, name, text in stages if name == starts_from["cpu"]]
    assert re.search(r"apt-get install .* g\+\+ ", text)


def test_no_secret_has_a_default_and_the_example_names_every_variable_without_one() -> None:
    used = dict(re.findall(r"\$\{(\w+)(:[-?])", COMPOSE))
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    assert {*used, "COMPOSE_PROJECT_NAME"} == example.keys()
    for name, operator in used.items():
        if re.search("PASSWORD|KEY|TOKEN", name):
            assert example[name] == ""
            assert operator == ":?" or f"${{{name}:-}}" in COMPOSE
    shell("git check-ignore --quiet docker/.env", ROOT)


def test_what_compose_and_the_dockerfile_name_is_there() -> None:
    for source in re.findall(r"^COPY (?!--)(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE):
        assert all((ROOT / file).is_file() for file in source.split())
    entrypoint = (DOCKER / "entrypoint.sh").read_text()
    for name, service in services().items():
        if "build" in service:
            assert f"\n{service['command'][0]})" in entrypoint, name
    assert (DOCKER / "postgres.sql").is_file()


def test_the_requirements_are_the_project_s_own() -> None:
    def printed(*parts: str) -> list[str]:
        return shell(f"python docker/requirements.py {' '.join(parts)}", ROOT).split()

    assert "torch>=2.8" in printed("project")
    assert "torch>=2.8" not in printed("server")
    assert {*printed("project", "s3")} == {*printed("project"), "dvc-s3"}
    assert "error: got ['nosuch']; name some of ['gpu', 'project'" in shell(
        "! python docker/requirements.py nosuch", ROOT
    )


def test_an_installed_environment_has_what_was_asked_for_at_the_tested_version(tmp_path: Path) -> None:
    build = tmp_path / "build"
    (tmp_path / "wheels").mkdir()
    build.mkdir()
    for name, version in (("alpha", "1.0"), ("alpha", "2.0"), ("beta", "1.0")):
        write_wheel(tmp_path / "wheels", name, version)
    (build / "pyproject.toml").write_text(
        '[project]\nname = "own"\ndependencies = ["alpha"]\noptional-dependencies = {s3 = ["beta"], gpu = ["absent"]}\n'
    )
    (build / "constraints.txt").write_text("alpha==1.0\n")
    for script in ("install.sh", "requirements.py"):
        (build / script).write_bytes((DOCKER / script).read_bytes())
    offline = environment(build, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "wheels"))
    shell(f"sh install.sh {tmp_path / 'venv'} project s3", build, offline)
    listed = shell(f"{tmp_path / 'venv'}/bin/python -m pip list --format freeze --not-required", build, offline)
    assert {"alpha==1.0", "beta==1.0"} <= set(listed.split())
    assert "own" not in listed


def write_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_the_image_s_own_copy_of_the_project_runs_without_git(tmp_path: Path) -> None:
    project = tmp_path / "workspace"
    for name, text in {**FILES, ".dvc/config": ""}.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    variables = environment(project, SPO_SERVICE_FILE=str(tmp_path / "service"))
    shell(f"{DOCKER / 'entrypoint.sh'} dvc repro", project, variables)
    assert (project / "runs/tiny/report/report.html").exists()
    shell(f"python {DOCKER / 'healthcheck.py'}", project, variables)  # a command is well as long as it runs


@pytest.mark.slow
def test_mlflow_s_server_keeps_artifacts_in_the_store_and_is_healthy_only_if_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store() as s3, free_port() as port:
        variables = environment(
            tmp_path / "workspace",
            **KEYS,
            AWS_ENDPOINT_URL=s3,
            MLFLOW_ARTIFACTS_DESTINATION="s3://mlflow",
            MLFLOW_BACKEND_STORE_URI=f"sqlite:///{tmp_path}/mlflow.db",
            MLFLOW_HOST="127.0.0.1",
            MLFLOW_PORT=port,
            MLFLOW_S3_ENDPOINT_URL=s3,
            MLFLOW_SERVER_ALLOWED_HOSTS=f"mlflow:5000,127.0.0.1:{port}",
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
            SPO_SERVICE_FILE=str(tmp_path / "service"),
        )
        entrypoint, healthcheck = DOCKER / "entrypoint.sh", f"python {DOCKER / 'healthcheck.py'}"
        assert "bucket mlflow: made" in shell(f"{entrypoint} buckets dvc mlflow", tmp_path, variables)
        assert "bucket mlflow: was there" in shell(f"{entrypoint} buckets dvc mlflow", tmp_path, variables)
        with running(entrypoint, "mlflow-server", folder=tmp_path, variables=variables):
            wait_until_healthy(healthcheck, tmp_path, variables)
            turned_away = {**variables, "MLFLOW_SERVER_ALLOWED_HOSTS": "elsewhere:5000"}
            assert "unhealthy: HTTP Error 403" in shell(f"! {healthcheck}", tmp_path, turned_away)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            client = mlflow.MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")  # others may have set another store
            run = client.create_run(client.create_experiment("spo-tiny"))
            client.log_text(run.info.run_id, "SPO wins.", "summary.txt")
        assert "unhealthy: " in shell(f"! {healthcheck}", tmp_path, variables)
        listed = boto3.client("s3", endpoint_url=s3, region_name="us-east-1", **credentials()).list_objects(
            Bucket="mlflow"
        )
        assert [item["Key"] for item in listed["Contents"]] == [f"1/{run.info.run_id}/artifacts/summary.txt"]


def credentials() -> dict[str, str]:
    return {name.lower(): value for name, value in KEYS.items() if name != "AWS_DEFAULT_REGION"}


@contextmanager
def store() -> Iterator[str]:
    """The address of an S3 server on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def free_port() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield str(port)


@contextmanager
def running(*command: str | Path, folder: Path, variables: dict[str, str]) -> Iterator[None]:
    """A service in the background, with its children; ended, not left, on the way out."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=15)  # a Prefect worker may hang after a cancelled run
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_healthy(healthcheck: str, folder: Path, variables: dict[str, str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run(healthcheck.split(), env=variables, check=False, capture_output=True).returncode:
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(1.0)
