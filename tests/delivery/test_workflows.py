"""The workflows: their syntax, what they are allowed, and that what they run is there."""

import itertools
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.delivery.conftest import ROOT, shell

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def workflow(name: str) -> dict[Any, Any]:
    return yaml.safe_load((ROOT / ".github/workflows" / name).read_text())


def steps() -> Iterator[dict[str, Any]]:
    for path in WORKFLOWS:
        for job in workflow(path.name)["jobs"].values():
            yield from job["steps"]


def commands() -> list[str]:
    return [line for step in steps() for line in step.get("run", "").splitlines()]


def test_the_workflows_follow_githubs_schema() -> None:
    shell("check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml", ROOT)


def test_the_workflows_pass_the_security_audit() -> None:
    shell("zizmor --offline --quiet .github/workflows", ROOT)


def test_actions_are_pinned_to_commits_and_say_their_release() -> None:
    uses = [line for path in WORKFLOWS for line in path.read_text().splitlines() if "uses:" in line]
    assert uses
    for line in uses:
        assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_nothing_is_interpolated_into_a_shell() -> None:
    assert [line for line in commands() if "${{" in line] == []


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_there(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        shell(f"make --dry-run {' '.join(arguments)}", ROOT)
    elif program == "docker":
        files = [value for name, value in itertools.pairwise(arguments) if name in ("--file", "--env-file")]
        assert all((ROOT / file).is_file() for file in files)
        if "--target" in arguments:
            target = arguments[arguments.index("--target") + 1]
            assert re.search(rf"^FROM .+ AS {target}$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    else:
        assert (ROOT / program).stat().st_mode & 0o111
        assert subprocess.run(["bash", "-n", ROOT / program], check=False).returncode == 0


def test_a_retrain_starts_where_there_is_something_to_retrain_for() -> None:
    on = workflow("retrain.yml")[True]  # YAML's `on`
    for pattern in on["push"]["paths"]:
        assert list(ROOT.glob(pattern)), pattern
    offered = set(on["workflow_dispatch"]["inputs"]["profile"]["options"])
    assert offered == {"", *(path.stem for path in (ROOT / "configs").glob("*.yaml"))}


def test_what_trains_may_not_write_and_what_writes_has_no_secrets() -> None:
    jobs = workflow("retrain.yml")["jobs"]
    assert jobs["train"]["permissions"] == {"contents": "read"}
    assert "secrets." not in str(jobs["propose"])
    assert all(step["with"]["persist-credentials"] is False for step in steps() if "checkout@" in step.get("uses", ""))


def test_scripts_are_committed_as_executable() -> None:
    for path in (ROOT / ".github/scripts").glob("*.sh"):
        assert path.stat().st_mode & 0o111, path
        assert Path(path).read_text().startswith("#!/usr/bin/env bash\n")


def test_the_tests_run_every_night_and_on_each_python_that_the_project_names() -> None:
    ci = workflow("ci.yml")
    assert ci[True]["schedule"]
    job = ci["jobs"]["test"]
    [setup] = [step for step in job["steps"] if "setup-python@" in step.get("uses", "")]
    assert setup["with"]["python-version"] == "${{ matrix.python }}"
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert job["strategy"]["matrix"]["python"] == [oldest, "3.12", "3.13"]
