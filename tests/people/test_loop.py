"""From choices in the browser to a retrained model and its report, with the real commands on the embedded default."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from spo.__main__ import main
from tests.delivery.conftest import environment, make_quick
from tests.people.browser import Browser, Page
from tests.people.test_browser import after, enter

ROOT = Path(__file__).parents[2]
NUM = 12
pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's settings and data, with as little work as every stage takes."""
    root = tmp_path / "project"
    for name in ("configs", "data"):
        shutil.copytree(ROOT / name, root / name)
    make_quick(root)
    monkeypatch.chdir(root)
    return root


@contextlib.contextmanager
def running(project: Path, *arguments: str) -> Iterator[tuple[str, list[str]]]:
    """The address that a command prints, and a list that has its last lines once it has been stopped by Ctrl-C."""
    variables = environment(project, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "spo", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, cwd=project, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    last: list[str] = []
    before = []
    for line in iter(process.stdout.readline, ""):
        before.append(line)
        if line.startswith("http://"):
            break
    else:
        pytest.fail(f"{' '.join(arguments)} ended:\n{''.join(before)}")
    try:
        yield line.split()[0], last
    finally:
        process.send_signal(signal.SIGINT)
        last += process.communicate()[0].splitlines()
    assert process.returncode == 130


def choose_all(page: Page) -> None:
    """Always the left picture, until the page says thanks."""
    while page.until("document.body.dataset.turn || document.getElementById('message').textContent"):
        if not page.value("document.body.dataset.turn"):
            return
        after(page, lambda: page.press("ArrowLeft"))


def test_choices_in_the_browser_retrain_the_model_and_its_report_shows_a_study(browser: Browser, project: Path) -> None:
    with running(project, "label", "mine", "--num", str(NUM), "--model", "base") as (url, last):
        page = browser.page()
        enter(page, url, "Anna")
        choose_all(page)
    assert last[-3].startswith(f"{NUM + 1} choices by anna in data/preferences/mine")  # one pair came again

    path = project / "configs" / "tiny.yaml"
    config = yaml.safe_load(path.read_text())
    config["prepare"]["preferences"] = {"source": "data/preferences/mine"}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    for stage in (["prepare"], ["train_preference", "pixel"], ["align", "spo"], ["evaluate"]):
        assert main(stage) == 0
    prepared = json.loads((project / "runs/tiny/prepare/metrics.json").read_text())["preferences"]
    assert (prepared["kept"], prepared["rejected"]) == (NUM + 1, {})

    with running(project, "study", "--num-prompts", "3") as (url, last):
        for name in ("Anna", "Ben"):
            page = browser.page()
            enter(page, url, name)
            choose_all(page)
    assert last[0].startswith("spo against base: better in ") and "of 6 choices" in last[0]
    assert main(["report"]) == 0
    report = (project / "runs/tiny/report/report.html").read_text()
    assert 'id="study"' in report and "2 people took part." in report
    page = browser.page()
    page.open((project / "runs/tiny/report/report.html").as_uri())
    assert page.text("#study h2") == "Human study"
    assert page.text("#study tbody th").split() == ["spo", "against", "base"]
