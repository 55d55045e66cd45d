"""`python -m spo export-preference-model`."""

from pathlib import Path
from typing import Annotated

import typer

from spo.commands.export import require_new
from spo.runtime.libraries import set_up_libraries


def export_preference_model(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", show_default=False)],
) -> None:
    """Write a preference model as published (.bin).

    The published code reads this file.
    """
    require_new(out)
    set_up_libraries()
    from spo.preference.checkpoint import export_published

    export_published(folder, out)
    print(out)
