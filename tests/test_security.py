"""What is read cannot run code, what is served is served to this machine, and what is secret stays so."""

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from spo.__main__ import main
from spo.commands.stage import settings
from spo.config import load_config
from spo.runtime.environment import environment
from spo.tracking.run import tags
from spo.tracking.store import run_url, unusable

ROOT = Path(__file__).parents[1]
SECRET = "hunter2-a-secret"
SOURCES = sorted(path for folder in ("spo", "flows") for path in (ROOT / folder).rglob("*.py"))
REFUSED = {  # calls that run what they read
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "Unpickler",
    "joblib.load",
    "dill.load",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.hub.load",
    "numpy.load",
    "np.load",
    "pd.read_pickle",
    "shutil.unpack_archive",
}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Every call of the source: where it is, the dotted name of what is called, and its node."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def test_nothing_that_is_read_is_run() -> None:
    found = [f"{where} calls {name}" for where, name, _ in calls() if name in REFUSED or name.endswith(".extractall")]
    assert found == []


def test_torch_load_takes_tensors_alone() -> None:
    loads = [(where, node) for where, name, node in calls() if name == "torch.load"]
    assert loads
    for where, node in loads:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert options.get("weights_only") == "True", where


def test_diffusers_weights_come_from_safetensors() -> None:
    pipelines = [
        (where, node)
        for where, name, node in calls()
        if name.endswith(".from_pretrained") and ("PIPELINES" in name or name.startswith(("Autoencoder", "type(")))
    ]
    assert len(pipelines) >= 2
    for where, node in pipelines:
        if where.startswith("spo/world/pretraining"):
            continue  # our own files, just written
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert options.get("use_safetensors") == "True", where


def test_no_repositorys_code_is_trusted_and_no_shell_is_used() -> None:
    for where, _, node in calls():
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert "trust_remote_code" not in options, where
        assert options.get("shell", "False") == "False", where


def test_the_runs_are_served_to_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[list[str]] = []
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execv", lambda _, command: served.append(command))
    assert main(["mlflow-ui"]) == 0
    assert served[0][served[0].index("--host") + 1] == "127.0.0.1"


def test_no_address_for_all_the_world_stands_in_the_source() -> None:
    for path in SOURCES:
        assert "0.0.0.0" not in path.read_text(encoding="utf-8"), path


URIS = [f"http://me:{SECRET}@host:5000/x", f"postgresql+psycopg2://me:{SECRET}@db/mlflow", f"https://{SECRET}@host"]


@pytest.mark.parametrize("uri", URIS)
def test_a_store_that_cannot_be_used_is_told_without_its_password(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    told = [str(unusable(tmp_path, OSError(f"no route to {uri}: refused"))), str(run_url(tmp_path, "1", "a"))]
    assert "cannot track at" in told[0] and "***@" in told[0]
    assert not any(SECRET in text for text in told)


def test_where_the_runs_are_is_told_without_the_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URIS[0])
    assert main(["mlflow-ui"]) == 0
    assert capsys.readouterr().out == "the runs are at http://***@host:5000/x\n"


def test_what_is_tracked_and_reported_has_no_value_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    config = load_config(ROOT, "tiny")
    told = [environment(ROOT), tags(config, "align", ROOT), settings(config, "align", "spo", 0)]
    assert SECRET not in json.dumps(told)


def test_workflows_have_least_permissions_and_pinned_actions() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
    for path in workflows:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow.get("permissions") in ({}, {"contents": "read"}), path
        for action in re.findall(r"uses:\s*(\S+)", path.read_text(encoding="utf-8")):
            assert action.startswith("./") or re.search(r"@[0-9a-f]{40}$", action), f"{path}: {action} is not pinned"
