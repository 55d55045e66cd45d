"""The command line: `python -m spo STAGE` runs one stage, `python -m spo repro` all stages that have changed.

A user's mistake ends with one line and exit code 1, wrong arguments with 2, Ctrl-C with 130, SIGTERM with 143.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads sleep instead of spinning: docs/api.md

from spo.commands.models import compare, export, export_preference_model, generate, import_preference_model
from spo.commands.people import label, study
from spo.commands.pipeline import check, mlflow_ui, promote, repro
from spo.commands.publish import publish
from spo.commands.stage import stage_command
from spo.pipeline import STAGES
from spo.runtime.exit_codes import exit_code

COMMANDS: tuple[Callable[..., Any], ...] = (
    repro,
    check,
    generate,
    compare,
    label,
    study,
    promote,
    mlflow_ui,
    export,
    publish,
    import_preference_model,
    export_preference_model,
)


class Group(TyperGroup):
    """Takes a command's name with hyphens or underscores, and turns errors into exit codes."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        names = {name.replace("_", "-"): name for name in self.commands}
        return super().get_command(ctx, names.get(cmd_name.replace("_", "-"), cmd_name))

    def invoke(self, ctx: Any) -> Any:
        run = super().invoke
        raise typer.Exit(exit_code(lambda: run(ctx)))


app = typer.Typer(cls=Group, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for stage in STAGES.values():
    app.command(stage.name, help=f"{stage.help[0].upper()}{stage.help[1:]}.")(stage_command(stage))
for command in COMMANDS:
    app.command()(command)


def show_version(asked: bool) -> None:
    if asked:
        print(f"spo {version('spo')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    """Step-aware Preference Optimization."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default the one of `sys.argv`; returns the exit code."""
    name = "spo" if Path(sys.argv[0]).name == "spo" else "python -m spo"  # as it was called, for its usage
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number
    try:
        typer.main.get_command(app)(args=None if arguments is None else list(arguments), prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
