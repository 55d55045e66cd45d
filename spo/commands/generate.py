"""`python -m spo generate`."""

from pathlib import Path
from typing import Annotated

import typer

from spo.commands.options import MODELS, Eta, FirstSeed, Guidance, Num, Pictures, Profile, Prompt, SamplerName, Steps
from spo.config import load_config
from spo.runtime.libraries import set_up_libraries


def generate(
    prompt: Prompt,
    model: Annotated[
        str | None, typer.Option(help=f"The model: {MODELS} (default: the evaluated LoRA, else the base).")
    ] = None,
    seed: FirstSeed = 0,
    num: Num = 1,
    out: Pictures = Path("pictures"),
    sampler: SamplerName = None,
    steps: Steps = None,
    guidance: Guidance = None,
    eta: Eta = None,
    profile: Profile = None,
) -> None:
    """Make pictures of a prompt."""
    config = load_config(Path(), profile)
    set_up_libraries()
    from spo.evaluation.sample_images import Sampler, show_one

    settings = Sampler.of(config, sampler, steps=steps, guidance=guidance, eta=eta)
    paths = show_one(config, prompt, model=model, seed=seed, num=num, out=out, sampler=settings, root=Path())
    print("\n".join(map(str, paths)))
