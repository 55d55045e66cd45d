"""`python -m spo promote`; `promote.py` has what it does, and needs torch."""

from pathlib import Path
from typing import Annotated

import typer

from spo.commands.options import Profile
from spo.config import load_config
from spo.runtime.libraries import set_up_libraries


def promote(
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose LoRA (default: promote.method, else the first method).")
    ] = None,
    against_base: Annotated[
        bool, typer.Option("--against-base", help="Compare with the base, not with the present champion.")
    ] = False,
    profile: Profile = None,
) -> None:
    """Make the evaluated LoRA champion if it has won.

    Registers it first; it becomes champion if it beats the present one.
    """
    config = load_config(Path(), profile)
    set_up_libraries()
    from spo import tracking
    from spo.commands.promote import run

    with tracking.spoken():
        run(config, method=method, against_base=against_base)
