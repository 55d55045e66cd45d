"""`python -m spo export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from spo.commands.options import Profile
from spo.config import load_config
from spo.errors import SpoError
from spo.runtime.libraries import set_up_libraries


def export(
    format: Annotated[Literal["diffusers", "kohya", "merged"], typer.Option(show_default=False)],
    out: Annotated[Path, typer.Option(metavar="PATH", help="A folder; for kohya a .safetensors file.")],
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="The method of the LoRA (default: the profile's first).")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="LORA", help="Instead: a run's folder, a LoRA's file or folder, a hub name.")
    ] = None,
    profile: Profile = None,
) -> None:
    """Write a trained model for use elsewhere.

    A LoRA for diffusers or for web user interfaces (kohya), or the base with the LoRA merged in.
    """
    if method and checkpoint:
        raise typer.BadParameter("give --method or --checkpoint, not both")
    config = load_config(profile=profile)
    if format == "kohya" and out.suffix != ".safetensors":
        raise SpoError(f"--out {out}: --format kohya writes one file; end its name in .safetensors")
    require_new(out)
    set_up_libraries()
    from spo.evaluation.resolve_model import resolve_model
    from spo.models.load import build
    from spo.models.policy import export, load_policy

    source = resolve_model(checkpoint or method, config)
    if source.lora is None:
        raise SpoError(
            f"there is nothing to export: {source.description}; run `python -m spo evaluate`, or name a --checkpoint"
        )
    denoiser = build(config.model, config.sampling, "cpu")
    load_policy(denoiser.network, source.lora)
    export(denoiser.network, format, out)
    print(f"{out}: {format} of {source.description}")


def require_new(out: Path) -> None:
    """SpoError where `out` exists: writing would replace it, and removing it is the user's decision."""
    if out.exists():
        raise SpoError(f"--out {out} exists already; remove it, or name another place")
