"""The methods of the profile, SPO's ablations among them, tuned by the same few trials each, on the test prompts.

    python -m experiments.methods [--methods spo spo_blind d3po ...] [--factors 1 0.5] [--seeds 0] [--quick]

The ablations are the profile's SPO with one setting changed (ABLATIONS). A trial trains a method with its own learning
rate times a factor, once for each training seed. The pipeline's rule chooses a checkpoint of each training on the
validation prompts, and then a trial of each method; its checkpoints are measured on the test prompts, against the base
and against the first method. Intervals cover prompts and, with several seeds, trainings. The tables of trials and of
methods are rewritten after every trial. A killed run resumes. Several runs with different
--methods and --out may run at once; a run with all methods then makes the complete table.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.measure import at_least, mistakes_in_one_line
from experiments.workbench import CheckpointScorer, cells, copy_outputs, digest, means_of, shortened, work_folder
from spo.config import Config, load_config
from spo.errors import SpoError
from spo.evaluation.checkpoint_selection import choose_checkpoint
from spo.metrics.metric import Scores
from spo.runtime.files import read_json, write_csv
from spo.runtime.libraries import set_up_libraries
from spo.stages import align
from spo.tracking import NullTracker
from spo.workspace import Workspace

Row = dict[str, Any]
ABLATIONS: dict[str, dict[str, Any]] = {  # of SPO: the paper's, and ours without its look-ahead
    "spo_from_win": {"continue_from": "win"},
    "spo_from_lose": {"continue_from": "lose"},
    "spo_random_pair": {"pairing": "random"},
    "spo_blind": {"scoring": {"timestep": 0}},
    "spo_2_candidates": {"candidates": 2},
    "spo_8_candidates": {"candidates": 8},
    "spo_no_look_ahead": {"look_ahead": 0},
}


def with_ablations(config: Config) -> Config:
    """The profile with the ablations of its method `spo` beside its own methods."""
    if (spo := config.align.get("spo")) is None:
        return config
    made = {name: type(spo).model_validate({**spo.model_dump(), **changes}) for name, changes in ABLATIONS.items()}
    return config.model_copy(update={"align": {**config.align, **made}})


@dataclass(frozen=True)
class Trial:
    """A method trained with one learning rate, once for each seed, and the chosen checkpoints."""

    method: str
    factor: float
    checkpoints: dict[int, Path]  # by seed
    validation: Scores  # each (seeds, n)
    row: Row


class Comparison:
    """Trains and measures trials."""

    def __init__(self, config: Config, *, seeds: Sequence[int], root: Path):
        self.config = config
        self.seeds = seeds
        self.root = root
        self.names = (config.evaluate.primary, *config.evaluate.guarded)
        work = work_folder("methods", config.model_copy(update={"align": {}}), {}, root=root)
        copy_outputs("prepare", config, source=root, target=work)
        self.scorer = CheckpointScorer(config, work)
        self.trials: list[Trial] = []

    def try_out(self, method: str, factor: float) -> None:
        """Make a trial."""
        settings = self.config.align[method]
        optimizer = settings.optimizer.model_copy(update={"learning_rate": factor * settings.optimizer.learning_rate})
        settings = settings.model_copy(update={"optimizer": optimizer, "watch": None})
        config = self.config.model_copy(update={"align": {method: settings}})
        checkpoints, costs = {}, []
        for seed in self.seeds:
            checkpoints[seed], cost = self._train(config, method, seed)
            costs.append(cost)
        found = self._scores(method, checkpoints, "validation")
        base = self.scorer.scores("base", None, "validation")
        names = ("rounds", "updates", "num_examples", "kept_share", "unet_forwards")
        row = {
            "method": method,
            "seeds": " ".join(map(str, self.seeds)),
            "learning_rate": optimizer.learning_rate,
            "checkpoints": " ".join(path.name for path in checkpoints.values()),
            **{name: fmean(cost[name] for cost in costs) for name in names},
            **cells(self.scorer.differences(found, base, "validation"), self.names),
        }
        self.trials.append(Trial(method, factor, checkpoints, found, row))

    def _train(self, config: Config, method: str, seed: int) -> tuple[Path, Row]:
        """Train once; the chosen checkpoint, and the cost of the training."""
        scorer = config.align[method].scorer
        preference = (
            {"preference_model": digest(Workspace(config, self.root).preference_model(scorer))} if scorer else {}
        )
        work = work_folder("methods", config, {"seed": seed, **preference}, root=self.root)
        workspace = Workspace(config, work)
        folder = workspace.aligned(method, seed)
        if not folder.exists():
            for stage in ("prepare", "preference_models"):
                copy_outputs(stage, config, source=self.root, target=work)
            align.run(config, method, seed, root=work, tracker=NullTracker())
        label = f"{method}-{work.name}"
        return self.scorer.choose(label, workspace.checkpoints(method, seed)), read_json(folder / "metrics.json")

    def _scores(self, method: str, checkpoints: Mapping[int, Path], split: str) -> Scores:
        """The scores, each (seeds, n), of a training's checkpoints."""
        found = [self.scorer.scores(f"{method}-{seed}", path, split) for seed, path in checkpoints.items()]
        return {name: torch.stack([scores[name] for scores in found]) for name in found[0]}

    def best(self, method: str) -> Trial:
        """The trial of a method that the pipeline's rule chooses."""
        own = [trial for trial in self.trials if trial.method == method]
        evaluate = self.config.evaluate
        chosen = choose_checkpoint(
            [means_of(trial.validation) for trial in own],
            means_of(self.scorer.scores("base", None, "validation")),
            primary=evaluate.primary,
            guarded=evaluate.guarded,
            tolerance=evaluate.guard_tolerance,
        )
        return own[chosen]

    def rows(self) -> list[Row]:
        """Each method's best trial on the test prompts: against the base, and against the first method."""
        methods = list(dict.fromkeys(trial.method for trial in self.trials))
        base = self.scorer.scores("base", None, "test")
        best = {method: self.best(method) for method in methods}
        scores = {method: self._scores(method, trial.checkpoints, "test") for method, trial in best.items()}
        compared = [(method, "base", base) for method in methods]
        compared += [(method, methods[0], scores[methods[0]]) for method in methods[1:]]
        return [
            {
                "method": method,
                "against": against,
                "seeds": best[method].row["seeds"],
                "trials": sum(trial.method == method for trial in self.trials),
                "learning_rate": best[method].row["learning_rate"],
                "checkpoints": best[method].row["checkpoints"],
                **cells(self.scorer.differences(scores[method], other, "test"), self.names),
            }
            for method, against, other in compared
        ]


@mistakes_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.methods", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="keys of the profile's `align` (default: all)")
    parser.add_argument(
        "--factors", type=at_least(0.001, float), nargs="+", default=[1.0, 0.5], help="of each method's learning rate"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the two tables")
    parser.add_argument("--quick", action="store_true", help="one epoch, two checkpoints, four prompts: does it run?")
    options = parser.parse_args(arguments)
    set_up_libraries()
    config = with_ablations(load_config())
    methods = options.methods or list(config.align)
    if unknown := [name for name in methods if name not in config.align]:
        raise SpoError(f"profile {config.profile} has no method {unknown}; it has {sorted(config.align)}")
    comparison = Comparison(shortened(config) if options.quick else config, seeds=options.seeds, root=Path())
    trials, table = options.out / "trials.csv", options.out / "methods.csv"
    for factor in options.factors:
        for method in methods:
            comparison.try_out(method, factor)
            write_csv(trials, [trial.row for trial in comparison.trials])
            write_csv(table, comparison.rows())
    print(f"{trials}\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
