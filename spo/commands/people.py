"""Commands for people in the loop: label and study."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spo.commands.models import MODELS, SamplerName
from spo.commands.stage import Profile
from spo.config import Config, load_config
from spo.errors import ConfigError, DataError
from spo.runtime.files import write_json
from spo.runtime.libraries import set_up_libraries
from spo.runtime.locking import locked
from spo.workspace import Workspace

if TYPE_CHECKING:
    from spo.people.answers import Answers
    from spo.people.pairs import Pool

LOOPBACK = "127.0.0.1"
Host = Annotated[str, typer.Option(help="Address to listen on. Other machines need the token that is then printed.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")]
RESULTS = "results.json"
MADE_BY_LABEL = {"made_by": "python -m spo label"}


def label(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the folder in data/preferences.")],
    model: Annotated[
        str | None, typer.Option(help=f"Whose pictures: {MODELS} (default: the evaluated LoRA, else the base).")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Instead of new pictures: existing pairs; a file, a folder or hub:NAME."),
    ] = None,
    num: Annotated[int | None, typer.Option(help="Number of pairs (default: 100; all of the existing ones).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new pictures.")] = 0,
    sampler: SamplerName = None,
    host: Host = LOOPBACK,
    port: Port = 8000,
    profile: Profile = None,
) -> None:
    """Choose the better of two pictures in the browser.

    The choices become preference pairs in data/preferences/NAME. The same command continues later.
    """
    config = load_config(profile=profile)
    if num is not None and num < 1:
        raise ConfigError(f"--num {num} makes no pair; use 1 or more")
    if pairs is not None and (model or sampler):
        raise ConfigError("--pairs shows existing pictures; leave out --model and --sampler")
    set_up_libraries()
    from spo.people.answers import Answers, check_folder_name
    from spo.people.pairs import Pool

    workspace = Workspace(config)
    folder = workspace.preferences(check_folder_name(name))
    with locked(workspace.shared_lock("label", name), f"label {name}"):
        answers = Answers(folder, MADE_BY_LABEL, pictures=True)
        if pairs is not None:
            from spo.people.pictures import existing_pairs

            if Path(pairs).resolve() == folder.resolve():
                raise DataError(f"--pairs {pairs} is the folder of {name} itself; use another NAME")
            pool = Pool(existing_pairs(pairs, workspace.pictures_cache, num=num), total=num)
        else:
            pool = _new_pictures(config, model, sampler, num=100 if num is None else num, seed=seed)
        shown = {"title": f"label {name}", "question": "Which picture is better?"}
        try:
            _serve(pool, answers, everyone=False, **shown, host=host, port=port)
        finally:
            if answers.annotators:
                _say_labels(config, answers)


def study(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Of the study (default: the profile).")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A column of the evaluation; may be given several times (default: all)."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Number of test prompts.")] = 20,
    results: Annotated[bool, typer.Option("--results", help="Only count the choices so far; serve no page.")] = False,
    host: Host = LOOPBACK,
    port: Port = 8000,
    profile: Profile = None,
) -> None:
    """Let people compare the evaluated models blindly.

    Writes win rates to data/studies/NAME; the report shows them.
    """
    config = load_config(profile=profile)
    if num_prompts < 1:
        raise ConfigError(f"--num-prompts {num_prompts} shows nothing; use 1 or more")
    set_up_libraries()
    from spo.people.answers import Answers, check_folder_name
    from spo.people.pairs import Pool
    from spo.people.study import about_study, study_pairs

    name = check_folder_name(config.profile if name is None else name)
    workspace = Workspace(config)
    with locked(workspace.shared_lock("study", name), f"study {name}"):
        about = about_study(config)
        answers = Answers(workspace.studies / name, about, pictures=False)
        if results:
            _write_results(config, answers)
            return
        found = study_pairs(config, columns or [], num_prompts)
        shown = {"title": f"study {name}", "question": "Which picture is better for this text?"}
        try:
            _serve(Pool(found, total=len(found)), answers, everyone=True, **shown, host=host, port=port)
        finally:
            if answers.annotators:
                _write_results(config, answers)


def _new_pictures(config: Config, model: str | None, sampler: str | None, *, num: int, seed: int) -> "Pool":
    from spo.evaluation.resolve_model import resolve_model
    from spo.evaluation.sample_images import choose_sampler
    from spo.people.pairs import Pool
    from spo.people.pictures import Pictures

    source = resolve_model(model, config)
    _, settings = choose_sampler(config, sampler, steps=None, guidance=None, eta=None)
    print(f"pictures by {source.description}", flush=True)
    pictures = Pictures(config, source, settings, seed=seed, folder=Workspace(config).pictures_cache)
    return Pool(pictures.pairs(num), total=num)


def _serve(
    pool: "Pool", answers: "Answers", *, everyone: bool, title: str, question: str, host: str, port: int
) -> None:
    """Serve the page while the pool fills, until a signal comes."""
    from spo.people.desk import Desk
    from spo.people.server import open_place, serve

    place = open_place(host, port)  # before anything slow, so that a busy port is told at once
    with place.listener:
        pool.start()
        if everyone:  # their order needs all pairs
            pool.join()
        try:
            serve(Desk(pool, answers, everyone=everyone), place, title=title, question=question)
        finally:
            pool.close()


def _say_labels(config: Config, answers: "Answers") -> None:
    """What there is now, and how to train on it."""
    people = answers.annotators
    rows = sum(answer.label is not None for name in people for answer in answers.of(name))
    folder = answers.folder.as_posix()
    print(f"{rows} choices by {', '.join(people)} in {folder}")
    if rows:
        print(
            f"to train on them, set prepare.preferences.source: {folder} in configs/{config.profile}.yaml and run "
            "`dvc repro`"
        )


def _write_results(config: Config, answers: "Answers") -> None:
    """Write and print a study's results; nothing is written before the first choice."""
    from spo.people.study import results, summary

    found = results(answers, samples=config.evaluate.bootstrap_samples)
    print(summary(found))
    if found["annotators"]:
        path = answers.folder / RESULTS
        write_json(path, {**answers.about, **found})
        print(f"{path}: `python -m spo report` shows it")
