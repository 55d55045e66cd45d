"""DVC for real: the pipeline in a fresh clone, and what it made carried through a folder and an S3 server."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.delivery.conftest import ROOT, environment, shell

MODEL = "runs/tiny/evaluate/lora"
pytestmark = pytest.mark.slow  # all use `ran`


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_a_fresh_clone_reproduces_without_a_remote_and_then_has_nothing_to_do(ran: Path) -> None:
    tracked = [line for line in shell("git ls-files", ran).splitlines() if line.startswith("runs/")]
    assert "runs/tiny/report/summary.txt" in tracked and "runs/tiny/evaluate/comparisons.csv" in tracked
    assert not [line for line in tracked if line.endswith((".html", "history.csv", "/scores.csv"))]  # DVC's
    metrics = [line for line in tracked if line.startswith("runs/tiny/") and line.endswith("metrics.json")]
    assert metrics == ["runs/tiny/evaluate/metrics.json", "runs/tiny/report/metrics.json"]
    assert (ran / "runs/tiny/report/report.html").is_file()
    assert max((ran / line).stat().st_size for line in tracked) < 300_000
    before = (ran / "dvc.lock").read_bytes()
    assert "Data and pipelines are up to date." in shell("dvc repro", ran)
    assert (ran / "dvc.lock").read_bytes() == before
    assert shell("git status --porcelain", ran) == ""


def test_prompts_preferences_and_checkpoints_are_in_the_lock_by_their_hashes(ran: Path) -> None:
    stages = yaml.safe_load((ran / "dvc.lock").read_text())["stages"]
    locked = {
        item["path"]: item["md5"]
        for stage in stages.values()
        for side in ("deps", "outs")
        for item in stage.get(side, [])
    }
    for path in ("data/prompts", "data/preferences", "data/base", "runs/tiny/preference_models/pixel", MODEL):
        assert len(locked[path]) == len("0123456789abcdef0123456789abcdef.dir")
    assert any(path.startswith("runs/tiny/align/spo") and path.endswith("checkpoints") for path in locked)
    assert locked["data/prompts/world.txt"] == hashlib.md5((ran / "data/prompts/world.txt").read_bytes()).hexdigest()


def test_a_folder_carries_what_was_made_to_another_clone(ran: Path, tmp_path: Path) -> None:
    other = clone(ran, tmp_path, f"dvc remote add --default store {tmp_path / 'store'}")
    shell("dvc push", with_cache_of(ran, other))
    assert_pulls(ran, other)


def test_an_s3_server_carries_what_was_made_to_another_clone(ran: Path, tmp_path: Path, s3: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": s3}
    variables = environment(tmp_path / "other", **keys)
    shell(f"python {ROOT / 'docker' / 'buckets.py'} dvc", tmp_path, variables)
    other = clone(ran, tmp_path, "dvc remote add --default store s3://dvc/spo")
    shell("dvc push", with_cache_of(ran, other), variables)
    assert_pulls(ran, other, variables)


def clone(ran: Path, folder: Path, remote: str) -> Path:
    """`git clone` with its remote set; it has nothing that git does not hold."""
    other = folder / "other"
    shell(f"git clone -q {ran} {other}", folder)
    shell(remote, other)
    assert not (other / MODEL).exists()
    return other


def with_cache_of(ran: Path, other: Path) -> Path:
    shutil.copytree(ran / ".dvc" / "cache", other / ".dvc" / "cache")
    return other


def assert_pulls(ran: Path, other: Path, variables: dict[str, str] | None = None) -> None:
    """From an empty cache, `dvc pull` restores every file and leaves nothing to run."""
    shutil.rmtree(other / ".dvc" / "cache")
    shell("dvc pull", other, variables)
    made = [path.relative_to(ran) for path in (ran / "runs").rglob("*") if path.is_file()]
    assert any(path.is_relative_to(MODEL) for path in made)
    for path in made:
        assert (other / path).read_bytes() == (ran / path).read_bytes()
    assert "Data and pipelines are up to date." in shell("dvc status", other, variables)
