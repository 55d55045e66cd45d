"""Options and arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

MODELS = "an evaluated method, a run's folder, a LoRA's file or folder, OWNER/NAME, models:/NAME@ALIAS or base"

Profile = Annotated[
    str | None, typer.Option(metavar="NAME", help="One of configs/*.yaml (default: the one in params.yaml).")
]
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)]
FirstSeed = Annotated[int, typer.Option(help="Seed of the first picture; each further picture takes the next seed.")]
Num = Annotated[int, typer.Option(help="Number of pictures.")]
Pictures = Annotated[Path, typer.Option(metavar="PATH", help="Folder of the pictures.")]
SamplerName = Annotated[
    str | None,
    typer.Option("--sampler", metavar="NAME", help="A sampler of evaluate.samplers (default: the first)."),
]
Steps = Annotated[int | None, typer.Option(help="Sampling steps (default: the sampler's).")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale (default: the sampler's).")]
Eta = Annotated[float | None, typer.Option(help="Noise while sampling: 0 none, 1 as in DDPM (default: the sampler's).")]
