"""The model card, and `python -m spo publish` against a stand-in of the hub's API."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from PIL import Image

from spo.__main__ import main
from tests.commands.test_export import trained  # noqa: F401  (a project after evaluation)

ROOT = Path(__file__).parents[2]
MEANS = """sampler,column,metric,mean,low,high,n,training_seeds
ddim,base,aesthetic,0.45,0.4,0.5,128,0
ddim,spo,aesthetic,0.5,0.45,0.55,128,1
"""
COMPARISONS = """sampler,column,against,metric,difference,low,high,win_rate,win_rate_low,win_rate_high,n,training_seeds
ddim,spo,base,aesthetic,0.05,0.037,0.065,0.8,0.73,0.87,128,1
"""


@pytest.fixture
def project(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    evaluated = trained / "runs" / "own" / "evaluate"
    (evaluated / "means.csv").write_text(MEANS)
    (evaluated / "comparisons.csv").write_text(COMPARISONS)
    Image.new("RGB", (8, 8)).save(evaluated / "samples.png")
    monkeypatch.chdir(trained)
    monkeypatch.setattr("spo.commands.models.set_up_libraries", lambda: None)
    return trained


def test_the_card_of_an_evaluated_lora_has_its_results_and_settings(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    assert main(["export", "--format", "diffusers", "--out", str(out), "--license", "apache-2.0"]) == 0
    card = ModelCard.load(out / "README.md")
    about = card.data.to_dict()
    assert (about["license"], about["library_name"]) == ("apache-2.0", "diffusers")
    assert about["pipeline_tag"] == "text-to-image" and {"lora", "sd15", "spo"} <= set(about["tags"])
    assert "| aesthetic | 0.450 | 0.500 | +0.050 [+0.037, +0.065] | 80% [73%, 87%] |" in card.text
    assert "128 prompts that were never trained on" in card.text
    assert "![samples](samples.png)" in card.text and (out / "samples.png").is_file()
    assert "same prompt and seed" in card.text
    for part in (
        "arXiv 2406.04314",
        "StableDiffusionPipeline.from_pretrained",
        "method: spo",
        "preference model pixel",
    ):
        assert part in card.text


def test_the_card_of_another_lora_claims_nothing(project: Path, tmp_path: Path) -> None:
    source = next((project / "runs/own/align/spo/seed-0/checkpoints").iterdir())
    assert main(["export", "--format", "diffusers", "--out", str(tmp_path / "lora"), "--checkpoint", str(source)]) == 0
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert "Results" not in card.text and "spo" not in card.data.tags and "Training" not in card.text
    assert not (tmp_path / "lora" / "samples.png").exists()


class Hub(BaseHTTPRequestHandler):
    """What `publish` needs of the hub; it accepts every card that names a licence."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "id": "me/lora", "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        if not self.path.endswith("validate-yaml") and self.headers["Authorization"] != "Bearer hf_right":
            return self._answer({"error": "Invalid token"}, 401)
        if self.path == "/api/validate-yaml":
            ok = "license:" in json.loads(body)["content"]
            return self._answer({} if ok else {"error": "license is missing"}, 200 if ok else 400)
        if self.path == "/api/repos/create":
            server.created = json.loads(body)
            return self._answer({"url": f"http://{self.headers['Host']}/me/lora"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._answer({"files": modes})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer(
                {"commitOid": "1" * 40, "commitUrl": f"http://{self.headers['Host']}/me/lora/commit/1", "success": True}
            )
        return self._answer({"error": f"no {self.path}"}, 404)

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created = {}, None
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def publish(hub: Any, *arguments: str, token: str = "hf_right") -> subprocess.CompletedProcess[str]:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    values = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "spo", "publish", "me/lora", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **values}, check=False)


def test_a_lora_is_published_with_its_card(project: Path, hub: Any) -> None:
    done = publish(hub, "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("me/lora: private")
    assert hub.created["name"] == "lora" and hub.created["visibility"] == "private"
    assert set(hub.files) == {"README.md", "pytorch_lora_weights.safetensors", "samples.png"}
    assert b"+0.050 [+0.037, +0.065]" in hub.files["README.md"]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("arguments", "token", "line"),
    [
        ([], "hf_right", "error: the hub refuses the model card: "),
        (["--license", "mit"], "hf_wrong", "error: me/lora could not be written: "),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    hub: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    token: str,
    line: str,
) -> None:
    monkeypatch.setattr("spo.commands.publish.set_up_libraries", lambda: None)
    monkeypatch.setattr("spo.runtime.hub.connect", lambda: True)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["publish", "me/lora", *arguments]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(line)
    assert not hub.files


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("reached", "token", "line"),
    [
        (False, "hf_right", "error: the hub cannot be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"),
        (True, None, "error: there is no token of the hub; run `hf auth login`, or set HF_TOKEN"),
        (True, "hf_right", "error: --method 'nosuch' names nothing here"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reached: bool, token: str | None, line: str
) -> None:
    monkeypatch.setattr("spo.commands.publish.set_up_libraries", lambda: None)
    monkeypatch.setattr("spo.runtime.hub.connect", lambda: reached)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert main(["publish", "me/lora", "--method", "nosuch"]) == 1
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("name", ["lora", "me/you/lora", ""])
def test_a_name_that_is_no_repository_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", name]) == 2
    assert "it should be OWNER/NAME" in capsys.readouterr().err
