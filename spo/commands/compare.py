"""`python -m spo compare`."""

from pathlib import Path
from typing import Annotated

import typer

from spo.commands.options import MODELS, Eta, FirstSeed, Guidance, Num, Pictures, Profile, Prompt, SamplerName, Steps
from spo.config import load_config
from spo.runtime.libraries import set_up_libraries


def compare(
    prompt: Prompt,
    model: Annotated[
        list[str] | None, typer.Option(help=f"A model: {MODELS}; may be given several times (default: as in generate).")
    ] = None,
    seed: FirstSeed = 0,
    num: Num = 4,
    out: Pictures = Path("pictures"),
    sampler: SamplerName = None,
    steps: Steps = None,
    guidance: Guidance = None,
    eta: Eta = None,
    profile: Profile = None,
) -> None:
    """Show base and aligned models side by side.

    Writes a picture a model and seed, and one sheet of all.
    """
    config = load_config(Path(), profile)
    set_up_libraries()
    from spo.evaluation.sample_images import Sampler, show_side_by_side

    settings = Sampler.of(config, sampler, steps=steps, guidance=guidance, eta=eta)
    models = model or []
    print(show_side_by_side(config, prompt, models=models, seed=seed, num=num, out=out, sampler=settings, root=Path()))
