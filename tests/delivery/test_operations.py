"""docs/operations.md: every command in it is one that the installed tools and this project's files take."""

import itertools
import os
import re
import shlex
import sys
import uuid

import pytest
import yaml
from dvc.cli import parse_args as dvc_parse
from prefect.cli._app import _app as prefect_app
from typer.main import get_command

from flows.full import command_line as flow_parser
from spo.__main__ import app
from tests.delivery.conftest import ROOT, shell

TEXT = (ROOT / "docs/operations.md").read_text()
PROGRAMS = ("dvc", "docker", "make", "prefect", "python")


def commands() -> list[str]:
    """The commands of the code blocks, and those in running text, each on one line and without its comment."""
    blocks = re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```\n.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    found = [part.strip() for line in lines for part in re.split(r"&&|\s#", line)]
    return sorted({command for command in found if command.split(" ")[0] in PROGRAMS and " " in command})


def test_the_commands_are_found() -> None:
    assert len(commands()) > 30


@pytest.mark.parametrize("command", commands())
def test_the_command_is_one(command: str) -> None:
    program, *arguments = shlex.split(re.split(r" [<>]+ ", command)[0])
    match program:
        case "make":
            shell(f"make --dry-run {arguments[0]}", ROOT)
        case "prefect":
            given = [str(uuid.uuid4()) if argument == "ID" else argument for argument in arguments]
            prefect_app.parse_args(
                [argument for argument in given if argument != "--no-prompt"], exit_on_error=False, print_error=False
            )
        case "dvc":
            dvc_parse(arguments)
        case "python":
            dash, module, *rest = arguments
            assert dash == "-m"
            assert module in ("spo", "flows.full")
            flow_parser().parse_args(rest) if module == "flows.full" else check_spo(rest)
        case "docker":
            check_docker(arguments)


def check_spo(arguments: list[str]) -> None:
    group = get_command(app)
    context = group.make_context("spo", list(arguments))
    name, command, rest = group.resolve_command(context, arguments)
    command.make_context(name, rest, parent=context)


def check_docker(arguments: list[str]) -> None:
    """Files, profiles and services of the deployment, targets of the images."""
    options = {name: value for name, value in itertools.pairwise(arguments) if name.startswith("--")}
    if arguments[0] == "compose":
        services = yaml.safe_load((ROOT / options["--file"]).read_text())["services"]
        profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
        assert options.get("--profile", "gpu") in profiles
        if "exec" in arguments or "run" in arguments:
            assert services.keys() & set(arguments)
    elif arguments[0] == "build":
        assert f" AS {options['--target']}\n" in (ROOT / options["--file"]).read_text()


def test_named_files_and_extras_are_there() -> None:
    for path in re.findall(r"`((?:docker|\.github|configs|data|docs)/[\w./-]+)`", TEXT):
        assert (ROOT / path.replace("docker/.env`", "")).exists() or path == "docker/.env", path
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"'\.\[(\w+)\]'", TEXT):
        assert f"\n{extra} = [" in project


def test_the_promoting_deployments_and_the_others_are_declared() -> None:
    declared = {deployment["name"] for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    named = set(re.findall(r"deployment run spo/(\w[\w-]*)", TEXT)) - {"full-2"}  # the text says how to make that one
    assert named <= declared


def test_prefect_s_server_sends_no_telemetry_when_it_is_started_as_the_text_says() -> None:
    [block] = [block for block in re.findall(r"^```\n(.*?)^```", TEXT, re.M | re.S) if "prefect server start" in block]
    exports = "; ".join(line for line in block.splitlines() if line.startswith("export "))
    python = "from prefect.settings import get_current_settings as s; print(s().server.analytics_enabled)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DO_NOT"))}
    assert shell(f"{exports}; {sys.executable} -c '{python}'", ROOT, clean) == "False\n"


def test_git_ignores_what_dvc_plots_writes() -> None:
    shell("git check-ignore --quiet dvc_plots/index.html", ROOT)
