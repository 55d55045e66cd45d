"""Commands that use trained models: generate, compare, export, and import and export of preference models."""

import os
import shutil
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from spo.commands.stage import Profile
from spo.config import Config, load_config
from spo.errors import SpoError
from spo.runtime.libraries import set_up_libraries
from spo.workspace import Workspace

Format: TypeAlias = Literal["diffusers", "kohya", "merged"]
MODELS = "an evaluated method, a run's folder, a LoRA's file or folder, OWNER/NAME, models:/NAME@ALIAS or base"


def _utf8(text: str) -> str:
    """A command line's text, whatever encoding the locale has; SpoError if it is no UTF-8."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise SpoError(f"the prompt {text!a} is no UTF-8; type it in a terminal that uses UTF-8") from None


Prompt = Annotated[str, typer.Argument(metavar="PROMPT", show_default=False, callback=_utf8)]
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
    config = load_config(profile=profile)
    set_up_libraries()
    from spo.evaluation.sample_images import Painter, choose_sampler

    chosen = choose_sampler(config, sampler, steps=steps, guidance=guidance, eta=eta)
    painter = Painter(config, prompt, seed=seed, num=num, out=out, sampler=chosen)
    print("\n".join(map(str, painter.paint(model))))


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
    config = load_config(profile=profile)
    set_up_libraries()
    from spo.evaluation.sample_images import Painter, choose_sampler

    chosen = choose_sampler(config, sampler, steps=steps, guidance=guidance, eta=eta)
    print(Painter(config, prompt, seed=seed, num=num, out=out, sampler=chosen).compare(model or []))


def export(
    format: Annotated[Format, typer.Option(show_default=False)],
    out: Annotated[Path, typer.Option(metavar="PATH", help="A folder; for kohya a .safetensors file.")],
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="The method of the LoRA (default: the profile's first).")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="LORA", help="Instead: a run's folder, a LoRA's file or folder, a hub name.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="For the model card of diffusers, e.g. apache-2.0.")
    ] = None,
    profile: Profile = None,
) -> None:
    """Write a trained model for use elsewhere.

    A LoRA for diffusers, with a model card, or for web user interfaces (kohya), or the base with the LoRA merged in.
    """
    if method is not None and checkpoint is not None:
        raise typer.BadParameter("give --method or --checkpoint, not both")
    config = load_config(profile=profile)
    if format == "kohya" and out.suffix != ".safetensors":
        raise SpoError(f"--out {out}: --format kohya writes one file; end its name in .safetensors")
    _require_new(out)
    set_up_libraries()
    print(write_export(config, format, out, method=method, checkpoint=checkpoint, license=license))


def write_export(
    config: Config,
    format: Format,
    out: Path,
    *,
    method: str | None = None,
    checkpoint: str | None = None,
    license: str | None = None,
) -> str:
    """Write the model to `out`, whole or not at all, and return a line about it."""
    from spo.evaluation.resolve_model import resolve_model
    from spo.models.lora import copy_lora
    from spo.models.lora_file import WEIGHTS
    from spo.report.model_card import SAMPLES, model_card
    from spo.runtime.files import atomic_path, write_text

    name, option = (method, "--method") if checkpoint is None else (checkpoint, "--checkpoint")
    source = resolve_model(name, config, option=option)
    if source.lora is None:
        raise SpoError(
            f"there is nothing to export: {source.description}; run `python -m spo evaluate`, or name a --checkpoint"
        )
    if format != "diffusers":
        _load_and_export(config, format, source.lora, out)
        return f"{out}: {format} of {source.description}"
    evaluated, lora = None if checkpoint else source.name, Path(source.lora)
    with atomic_path(out) as made:
        if (lora / WEIGHTS).is_file() and _is_within(lora, Workspace(config).runs) and _fits(lora / WEIGHTS, config):
            copy_lora(lora, made)  # a stage of the profile wrote it in this format
        else:
            _load_and_export(config, format, source.lora, made)
        write_text(made / "README.md", model_card(config, evaluated, license=license))
        if evaluated and (samples := Workspace(config).evaluate / SAMPLES).is_file():
            shutil.copyfile(samples, made / SAMPLES)
    return f"{out}: {format} of {source.description}"


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _fits(file: Path, config: Config) -> bool:
    """Whether our LoRA's layers are those of the profile's base, which may have changed since; nothing is loaded."""
    from safetensors import SafetensorError, safe_open

    from spo.commands.architectures import network_of
    from spo.commands.preflight import UNFIT

    try:
        network = network_of(config.model)
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                layer = network.get_submodule(name.partition(".")[2].rpartition(".lora.")[0])
                shape, is_down = weights.get_slice(name).get_shape(), name.endswith("down.weight")
                if (shape[1] != layer.in_features) if is_down else (shape[0] != layer.out_features):
                    return False
    except (*UNFIT, OSError, SafetensorError):  # the base says what is wrong
        return False
    return True


def _load_and_export(config: Config, format: Format, lora: str | Path, out: Path) -> None:
    """Write the profile's base with the LoRA, or that LoRA in another format."""
    from spo.models import policy
    from spo.models.load import build

    denoiser = build(config.model, config.sampling, "cpu")
    policy.load_policy(denoiser.network, lora)
    policy.export(denoiser.network, format, out)


def import_preference_model(
    source: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FOLDER", show_default=False)],
    clip: Annotated[
        str | None, typer.Option(metavar="REPO", help="Of a file: the CLIP with the model's configuration.")
    ] = None,
    processor: Annotated[
        str | None, typer.Option(metavar="REPO", help="Of a file: where the tokenizer is, if not in --clip.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="REPO", help="Of a folder: the diffusion model that it was made from.")
    ] = None,
) -> None:
    """Convert a published preference model.

    It is SPO's file (.bin) or LPO's folder. The result is a folder that `checkpoint` of a preference model can name.
    """
    _require_new(out)
    if source.is_dir() == (base is None) or source.is_dir() == (clip is not None):
        raise SpoError(f"{source}: name --clip for a file (.bin), or --base for a folder in LPO's layout")
    set_up_libraries()
    if base is not None:
        from spo.preference.latent_checkpoint import save_latent_preference
        from spo.preference.latent_published import read_published_latent

        save_latent_preference(read_published_latent(source, base), out)
    else:
        from spo.preference.checkpoint import import_published

        assert clip is not None
        import_published(source, clip, out, processor=processor)
    print(f"{out}: name it as the checkpoint of a preference model in a profile")


def export_preference_model(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="PATH", show_default=False)],
) -> None:
    """Write a preference model as published.

    That is SPO's file (.bin), or LPO's folder for a latent one; the published code reads it.
    """
    _require_new(out)
    set_up_libraries()
    from spo.preference.checkpoint import export_published, kind_of

    if kind_of(folder) == "latent":
        from spo.preference.latent_checkpoint import load_latent_preference
        from spo.preference.latent_published import write_published_latent

        write_published_latent(load_latent_preference(folder), out)
    else:
        export_published(folder, out)
    print(out)


def _require_new(out: Path) -> None:
    """SpoError if `out` exists: the user decides whether to remove it."""
    if out.exists():
        raise SpoError(f"--out {out} exists already; remove it, or name another place")
