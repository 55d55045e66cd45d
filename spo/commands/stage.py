"""Run one stage: `python -m spo STAGE`."""

import importlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from spo.commands.preflight import require
from spo.config import Config, load_config
from spo.errors import SpoError
from spo.pipeline import STAGES, Stage
from spo.runtime.libraries import set_up_libraries
from spo.runtime.locking import locked
from spo.runtime.processes import LAUNCHED, launch
from spo.workspace import Workspace

Profile = Annotated[
    str | None, typer.Option(metavar="NAME", help="One of configs/*.yaml (default: the one in params.yaml).")
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what a stopped run had saved.")]


def stage_command(stage: Stage) -> Callable[..., int]:
    """The command of a stage, with the options that this stage has."""

    def plain(profile: Profile = None) -> int:
        return run_stage(stage, profile)

    def resumable(profile: Profile = None, restart: Restart = False) -> int:
        return run_stage(stage, profile, restart=restart)

    def per_method(
        method: Annotated[str, typer.Argument(metavar="NAME", help="A key of the profile's align section.")],
        seed: Annotated[int | None, typer.Option(help="Training seed (default: the first of training_seeds).")] = None,
        profile: Profile = None,
        restart: Restart = False,
    ) -> int:
        return run_stage(stage, profile, method, seed, restart=restart)

    return per_method if stage.per_method else resumable if stage.resumable else plain


def run_stage(
    stage: Stage, profile: str | None, method: str | None = None, seed: int | None = None, *, restart: bool = False
) -> int:
    """Run a stage in the current folder and track it; the last line says how long it took. Returns the exit code."""
    root = Path()
    config = load_config(root, profile)
    if method is not None and method not in config.align:
        raise SpoError(f"align {method}: profile {config.profile} has no such method; it has {sorted(config.align)}")
    if method is not None and seed is None:
        seed = config.training_seeds[0]
    if stage.checked:
        require(config, stage.name, root)
    arguments = [stage.name, *([] if method is None else [method, "--seed", str(seed)])]
    label = " ".join(arguments)
    if config.launch.num_processes > 1 and stage.distributed and not {"RANK", LAUNCHED} & set(os.environ):
        return launch(config.launch, [*arguments, "--profile", config.profile, *(["--restart"] if restart else [])])
    set_up_libraries()
    from spo import tracking
    from spo.runtime import distributed

    distributed.join()
    run = importlib.import_module(f"spo.stages.{stage.name}").run
    start = time.monotonic()
    job = (stage.name, *(() if method is None else (method, f"seed-{seed}")))
    with only_one(config, job, root):
        if restart:
            shutil.rmtree(Workspace(config, root).state(*job), ignore_errors=True)
        with tracking.start(config, stage.name, root, method=method, seed=seed) as tracker:
            tracker.log_params(settings(config, stage.name, method, seed))
            run(config, *(() if method is None else (method, seed)), root=root, tracker=tracker)
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


def settings(config: Config, stage: str, method: str | None = None, seed: int | None = None) -> dict[str, Any]:
    """The settings recorded with a stage's run: its sections, and those of the method with the training seed."""
    values = config.model_dump(mode="json", include=set(STAGES[stage].sections))
    if method is not None:
        values |= {"align": config.align[method].model_dump(mode="json"), "training_seed": seed}
    return values
