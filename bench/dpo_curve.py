"""How far Diffusion-DPO gets with much more training: score against compute, beside another method's curve.

    python -m bench.dpo_curve [--epochs 40] [--checkpoints 20] [--quick]

Trains Diffusion-DPO for longer than the pipeline does, measures every checkpoint on the validation prompts with the
pipeline's sampler and seeds, and measures the checkpoints that `python -m spo align spo` left in the same way. Writes
one row a checkpoint; the compute that SPO needs for Diffusion-DPO's best score is a figure read off these rows, and
printed. What is finished is not done again: a killed run goes on when it is called again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.workbench import Ruler, adopt, cells, checkpoints, means_of, place
from spo.config import Config, load_config
from spo.errors import SpoError
from spo.evaluation.cost import Point, saving
from spo.files import read_json
from spo.stages import align
from spo.tables import write_csv
from spo.tracking import NullTracker

METHOD = "diffusion_dpo"
QUICK = {"num_prompts": 4, "num_validation_prompts": 4, "bootstrap_samples": 200}


def curve(config: Config, *, seed: int, against: Sequence[str], root: Path) -> list[dict[str, Any]]:
    """One row a checkpoint of the longer run, and of what the pipeline left of the methods `against`."""
    own = config.model_copy(update={"align": {METHOD: config.align[METHOD]}})
    work = place("dpo_curve", own, {"seed": seed}, root=root)
    adopt("prepare", config, source=root, target=work)
    runs = {METHOD: work / config.aligned(METHOD, seed)}
    if not runs[METHOD].exists():
        align.run(config, METHOD, seed, root=work, tracker=NullTracker())
    for name in against:
        runs[name] = root / config.aligned(name, seed)
        if not checkpoints(runs[name]):
            raise SpoError(f"{runs[name]} has no checkpoints; run `python -m spo align {name} --seed {seed}`")
    ruler = Ruler(config, work / config.folder("prepare"), work / "scores")
    base = ruler.scores("base", None, "validation")
    main = (config.evaluate.primary, *config.evaluate.guarded)
    rows = []
    for name, run in runs.items():
        for checkpoint in checkpoints(run):
            cost = read_json(checkpoint / "cost.json")
            scores = ruler.scores(f"{name}-{checkpoint.name}", checkpoint, "validation")
            means = means_of(scores)
            rows.append(
                {
                    "method": name,
                    "seed": seed,
                    "checkpoint": checkpoint.name,
                    **{key: cost[key] for key in ("updates", "num_pairs", "unet_forwards", "seconds")},
                    **{key: means[key] for key in main},
                    **cells(ruler.differences(scores, base, "validation"), main),
                }
            )
    return rows


def told(rows: Sequence[dict[str, Any]], config: Config) -> list[str]:
    """What each other method's curve says of Diffusion-DPO's best, in words."""
    evaluate = config.evaluate

    def points(name: str) -> list[Point]:
        return [
            Point(
                row["unet_forwards"],
                row[f"{evaluate.primary}_difference"],
                all(row[f"{guard}_difference"] >= -evaluate.guard_tolerance for guard in evaluate.guarded),
            )
            for row in rows
            if row["method"] == name
        ]

    lines = []
    for name in dict.fromkeys(row["method"] for row in rows if row["method"] != METHOD):
        found = saving(points(name), points(METHOD), base=0.0)
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


def longer(config: Config, *, epochs: int, num_checkpoints: int, quick: bool) -> Config:
    """The configuration of the longer run."""
    if METHOD not in config.align:
        raise SpoError(f"profile {config.profile} has no method {METHOD}; it has {sorted(config.align)}")
    settings = config.align[METHOD].model_copy(update={"epochs": epochs, "checkpoints": num_checkpoints, "watch": None})
    evaluate = config.evaluate.model_copy(update=QUICK if quick else {})
    return config.model_copy(update={"align": {**config.align, METHOD: settings}, "evaluate": evaluate})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.dpo_curve", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", nargs="*", default=["spo"], metavar="NAME", help="methods that have been aligned")
    parser.add_argument("--out", type=Path, default=Path("bench/results/dpo_curve.csv"))
    parser.add_argument("--quick", action="store_true", help="one epoch, two checkpoints, four prompts: does it run?")
    options = parser.parse_args(arguments)
    size = (1, 2) if options.quick else (options.epochs, options.checkpoints)
    try:
        config = longer(load_config(), epochs=size[0], num_checkpoints=size[1], quick=options.quick)
        rows = curve(config, seed=options.seed, against=options.against, root=Path())
        write_csv(options.out, rows)
        print("\n".join([*told(rows, config), str(options.out)]))
    except SpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
