"""Run one stage: `python -m spo STAGE`."""

import importlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from spo.commands.headline import show_results
from spo.commands.preflight import require
from spo.config import Config, load_config
from spo.errors import SpoError
from spo.pipeline import STAGES, Stage
from spo.runtime.libraries import set_up_libraries
from spo.runtime.locking import locked
from spo.runtime.processes import LAUNCHED, PROCESSES, launch
from spo.workspace import Workspace

Profile = Annotated[
    str | None, typer.Option(metavar="NAME", help="One of configs/*.yaml (default: the one in params.yaml).")
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what a stopped run had saved.")]


def stage_command(stage: Stage) -> Callable[..., int]:
    """The command of a stage, with the options that this stage has."""

    def plain(profile: Profile = None) -> int:
        return run_stage(stage, profile)

    def per_method(
        name: Annotated[str, typer.Argument(metavar="NAME", help="A key of the profile's align section.")],
        seed: Annotated[int | None, typer.Option(help="Training seed (default: the first of training_seeds).")] = None,
        profile: Profile = None,
        restart: Restart = False,
    ) -> int:
        return run_stage(stage, profile, name, seed, restart=restart)

    def per_preference_model(
        name: Annotated[str, typer.Argument(metavar="NAME", help="A key of the profile's preference_models.")],
        profile: Profile = None,
        restart: Restart = False,
    ) -> int:
        return run_stage(stage, profile, name, restart=restart)

    commands: dict[str, Callable[..., int]] = {"method": per_method, "preference_model": per_preference_model}
    return commands.get(stage.item, plain)


def run_stage(
    stage: Stage, profile: str | None, name: str | None = None, seed: int | None = None, *, restart: bool = False
) -> int:
    """Run a stage in the current folder and track it; the last line says how long it took. Returns the exit code.

    name: of the method or preference model, where the stage takes one.
    """
    root = Path()
    config = load_config(root, profile)
    known: Mapping[str, Any] = config.align if stage.item == "method" else config.preference_models
    if name is not None and name not in known:
        raise SpoError(f"{stage.name} {name}: profile {config.profile} has no {name!r}; it has {sorted(known)}")
    if stage.item == "method" and seed is None:
        seed = config.training_seeds[0]
    set_up_libraries()
    if stage.checked and LAUNCHED not in os.environ:  # the process that launched this one has checked
        require(config, stage.name, root)
    item = [*([] if name is None else [name]), *([] if seed is None else ["--seed", str(seed)])]
    arguments = [stage.name, *item]
    label = " ".join(arguments)
    given = os.environ.get(PROCESSES, "")
    processes = int(given) if given.isdecimal() else config.launch.num_processes
    if processes > 1 and stage.distributed and not {"RANK", LAUNCHED} & set(os.environ):
        launching = config.launch.model_copy(update={"num_processes": processes})
        return launch(launching, [*arguments, "--profile", config.profile, *(["--restart"] if restart else [])])
    from spo import tracking
    from spo.runtime import distributed

    distributed.join()
    run = importlib.import_module(f"spo.stages.{stage.name}").run
    start = time.monotonic()
    job = [stage.name, *([] if name is None else [name]), *([] if seed is None else [f"seed-{seed}"])]
    with only_one(config, job, root):
        if restart:
            shutil.rmtree(Workspace(config, root).state(*job), ignore_errors=True)
        with tracking.start(config, stage.name, root, name=name, seed=seed) as tracker:
            tracker.log_params(settings(config, stage.name, name, seed))
            run(config, *(value for value in (name, seed) if value is not None), root=root, tracker=tracker)
            if os.environ.get("RANK", "0") == "0":
                show_results(config, stage.name, root, tracker)
    if stage.name == "report":
        from spo.commands.promote import register_released

        register_released(config, root)
    if os.environ.get("RANK", "0") == "0":
        print(f"{label}: done in {time.monotonic() - start:.1f} s", flush=True)
    distributed.leave()
    return 0


def only_one(config: Config, job: Sequence[str], root: Path) -> AbstractContextManager[None]:
    """Lock a job (stage, method, seed) while it runs; LockedError if another process has the lock.

    Of the processes of one run only the first takes the lock.
    """
    if os.environ.get("RANK", "0") != "0":
        return nullcontext()
    return locked(Workspace(config, root).lock(*job), f"{' '.join(job)} of profile {config.profile}")


def settings(config: Config, stage: str, name: str | None = None, seed: int | None = None) -> dict[str, Any]:
    """The settings recorded with a stage's run: its sections, and those of the method or preference model."""
    values = config.model_dump(mode="json", include=set(STAGES[stage].sections))
    if STAGES[stage].item == "method":
        assert name is not None
        values |= {"align": config.align[name].model_dump(mode="json"), "training_seed": seed}
    elif name is not None:
        values |= {"train_preference": config.preference_models[name].model_dump(mode="json")}
    return values
