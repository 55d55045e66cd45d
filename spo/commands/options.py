"""The option that most commands have."""

from typing import Annotated

import typer

Profile = Annotated[
    str | None, typer.Option(metavar="NAME", help="One of configs/*.yaml (default: the one in params.yaml).")
]
