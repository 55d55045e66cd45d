"""Diffusion-DPO with much more training: score against compute, compared with other methods.

    python -m experiments.dpo_curve [--epochs 10] [--checkpoints 20] [--learning-rates 2e-3 1e-3] [--schedule linear]
        [--quick]

Trains Diffusion-DPO for longer than the pipeline does, once for each learning rate, and measures every checkpoint on
the validation prompts with the pipeline's sampler and seeds; measures the checkpoints of `python -m spo align spo` in
the same way. Writes a row for each checkpoint and prints the compute that SPO needs for the best score of the longer
runs. A killed run resumes when it is started again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import mistakes_in_one_line
from experiments.workbench import QUICK, CheckpointScorer, cells, copy_outputs, means_of, work_folder
from spo.config import Config, load_config
from spo.errors import SpoError
from spo.report.compute_saving import Point, saving
from spo.runtime.files import read_json, write_csv
from spo.runtime.libraries import set_up_libraries
from spo.stages import align
from spo.tracking import NullTracker
from spo.workspace import Workspace

Row = dict[str, Any]
METHOD = "diffusion_dpo"


def curve(config: Config, runs: Sequence[Config], *, seed: int, against: Sequence[str], root: Path) -> list[Row]:
    """A row for each checkpoint of the longer runs, and of the pipeline's trainings of the methods `against`."""
    rows = []
    for run in runs:
        own = run.model_copy(update={"align": {METHOD: run.align[METHOD]}})
        work = work_folder("dpo_curve", own, {"seed": seed}, root=root)
        copy_outputs("prepare", config, source=root, target=work)
        workspace = Workspace(config, work)
        if not workspace.aligned(METHOD, seed).exists():
            align.run(run, METHOD, seed, root=work, tracker=NullTracker())
        rows += _measured(run, METHOD, workspace.checkpoints(METHOD, seed), work, seed=seed)
    for name in against:
        found = Workspace(config, root).checkpoints(name, seed)
        if not found:
            raise SpoError(f"{name} has no checkpoints; run `python -m spo align {name} --seed {seed}`")
        rows += _measured(config, name, found, work, seed=seed)  # scores are cached with the last run's
    return rows


def _measured(config: Config, name: str, checkpoints: Sequence[Path], work: Path, *, seed: int) -> list[Row]:
    """A row for each checkpoint of a run."""
    scorer = CheckpointScorer(config, work)
    base = scorer.scores("base", None, "validation")
    main = (config.evaluate.primary, *config.evaluate.guarded)
    settings = config.align[name]
    rows = []
    for checkpoint in checkpoints:
        cost = read_json(checkpoint / "cost.json")
        scores = scorer.scores(f"{name}-{checkpoint.name}", checkpoint, "validation")
        means = means_of(scores)
        rows.append(
            {
                "method": name,
                "learning_rate": settings.optimizer.learning_rate,
                "schedule": settings.optimizer.schedule,
                "epochs": settings.epochs,
                "seed": seed,
                "checkpoint": checkpoint.name,
                **{key: cost[key] for key in ("updates", "num_examples", "unet_forwards", "seconds")},
                **{key: means[key] for key in main},
                **cells(scorer.differences(scores, base, "validation"), main),
            }
        )
    return rows


def sentences(rows: Sequence[Row], config: Config) -> list[str]:
    """Compare each other method's curve with the best score of all of Diffusion-DPO's runs."""
    evaluate = config.evaluate

    def points(some: Sequence[Row]) -> list[Point]:
        return [
            Point(
                row["unet_forwards"],
                row[f"{evaluate.primary}_difference"],
                all(row[f"{guard}_difference"] >= -evaluate.guard_tolerance for guard in evaluate.guarded),
            )
            for row in some
        ]

    curves: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        curves.setdefault((row["method"], row["learning_rate"], row["schedule"]), []).append(row)
    own = [points(some) for (method, *_), some in curves.items() if method == METHOD]
    best = max(own, key=lambda curve: max((point.score for point in curve if point.kept), default=0.0))
    lines = []
    for (name, *_), some in curves.items():
        if name == METHOD:
            continue
        found = saving(points(some), best, base=0.0)
        if found is None:
            lines.append(f"{METHOD} has no checkpoint above the base in {evaluate.primary}, so there is none to reach")
        elif found.times is None:
            lines.append(f"{name} does not reach {METHOD}'s best gain, {found.level:+.4f} in {evaluate.primary}")
        else:
            lines.append(
                f"{name} reaches {METHOD}'s best gain, {found.level:+.4f} in {evaluate.primary}, with "
                f"{found.times:.2g} times less compute: {found.reached:,.0f} UNet forwards against {found.compute:,.0f}"
            )
    return lines


def longer(
    config: Config, *, epochs: int, num_checkpoints: int, rate: float | None, schedule: str | None, quick: bool
) -> Config:
    """The configuration of a longer run; None keeps the profile's learning rate or schedule."""
    if METHOD not in config.align:
        raise SpoError(f"profile {config.profile} has no method {METHOD}; it has {sorted(config.align)}")
    settings = config.align[METHOD]
    changes = {"learning_rate": rate, "schedule": schedule}
    optimizer = settings.optimizer.model_copy(update={key: new for key, new in changes.items() if new is not None})
    settings = settings.model_copy(
        update={"epochs": epochs, "checkpoints": num_checkpoints, "watch": None, "optimizer": optimizer}
    )
    evaluate = config.evaluate.model_copy(update=QUICK if quick else {})
    return config.model_copy(update={"align": {**config.align, METHOD: settings}, "evaluate": evaluate})


@mistakes_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.dpo_curve", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--learning-rates", type=float, nargs="+", help="a run each (default: the profile's own rate)")
    parser.add_argument("--schedule", choices=["constant", "linear"], help="(default: the profile's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", nargs="*", default=["spo"], metavar="NAME", help="methods that have been aligned")
    parser.add_argument("--out", type=Path, default=Path("bench/results/dpo_curve.csv"))
    parser.add_argument("--quick", action="store_true", help="one epoch, two checkpoints, four prompts: does it run?")
    options = parser.parse_args(arguments)
    set_up_libraries()
    epochs, num_checkpoints = (1, 2) if options.quick else (options.epochs, options.checkpoints)
    size: dict[str, Any] = {"epochs": epochs, "num_checkpoints": num_checkpoints, "quick": options.quick}
    config = load_config()
    runs = [longer(config, **size, rate=rate, schedule=options.schedule) for rate in options.learning_rates or [None]]
    config = config.model_copy(update={"evaluate": runs[0].evaluate})
    rows = curve(config, runs, seed=options.seed, against=options.against, root=Path())
    write_csv(options.out, rows)
    print("\n".join([*sentences(rows, config), str(options.out)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
