"""SPO's and Diffusion-DPO's gains against the share of finish in the labels, and against the labels' noise.

    python -m experiments.share_sweep [--shares 0.05 0.1 0.25 0.5 0.7] [--temperatures 0.3] [--seeds 0]
        [--pairs prepared base] [--methods spo diffusion_dpo] [--preference-steps 2700] [--step-aware-steps 200]
        [--quick]

The hypothesis: what an image shows dominates generic labels, so the signal of finish is lost in a pair of different
images, while candidates of one x_t differ in little else. For each cell of the sweep, pairs are labelled again by an
opinion with that share and noise: either the prepared pairs, whose images come from better and worse checkpoints, or
the same number of images by the base, which differ only by chance. A clean-image preference model that sees but has no
preference learns that opinion; then the stages train_preference and align run. Gains are on the test prompts, for the
checkpoint that the pipeline's rule chooses on the validation prompts.

Finished parts of a cell are cached under .cache/bench, so a killed sweep resumes; the table is rewritten after every
cell.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Generator

from bench.measure import at_least, mistakes_in_one_line
from experiments.pictures import lessons, like_pictures, prepared_pictures
from experiments.relabel import Comparisons, prepared_comparisons, rings, write_pairs
from experiments.teacher import Effort, Teacher
from experiments.workbench import CheckpointScorer, copy_outputs, shortened, work_folder
from spo.config import Config, load_config
from spo.errors import SpoError
from spo.runtime.files import atomic_path, read_json, write_csv, write_json
from spo.runtime.libraries import set_up_libraries
from spo.stages import align
from spo.stages import train_preference as preference_stage
from spo.tracking import NullTracker
from spo.workspace import Prepared, Workspace
from spo.world.opinion import Opinion
from spo.world.pretraining.recipe import RECIPE

METHODS = ("spo", "diffusion_dpo")


@dataclass(frozen=True)
class Cell:
    share: float  # of the opinion's variance that comes from finish
    temperature: float  # of its logistic error, in standard deviations of utility
    seed: int  # of labels and trainings
    pairs: str = "prepared"  # or "base": whose pictures are compared

    @property
    def name(self) -> str:
        return f"{self.pairs}_{self.labelling}"

    @property
    def labelling(self) -> str:
        return f"share-{self.share:g}_temperature-{self.temperature:g}_seed-{self.seed}"

    @property
    def opinion(self) -> Opinion:
        return Opinion(self.share, self.temperature, RECIPE.tie)


class Sweep:
    """Trains and measures the cells; they share the pictures, the teacher and the scorer of checkpoints."""

    def __init__(self, config: Config, methods: Sequence[str], *, effort: Effort, root: Path):
        missing = [name for name in methods if name not in config.align]
        if missing:
            raise SpoError(f"profile {config.profile} has no method {missing}; it has {sorted(config.align)}")
        self.base = Path(config.model.path)
        if not (self.base / "vae").is_dir():
            raise SpoError(f"{self.base}/vae is missing; the sweep is of the drawn world, whose model lies in a folder")
        unwatched = {name: config.align[name].model_copy(update={"watch": None}) for name in methods}
        self.config = config.model_copy(update={"align": unwatched})
        self.methods = methods
        self.effort = effort
        self.work = work_folder("share_sweep", config, {"effort": asdict(effort)}, root=root)
        copy_outputs("prepare", config, source=root, target=self.work)
        self.prepared = Workspace(config, self.work).prepared
        self.prompts = self.prepared.prompts("train")
        self.pictures = prepared_pictures(self.prepared)
        self.scorer = CheckpointScorer(config, self.work)

    @cached_property
    def teacher(self) -> Teacher:
        file, per_prompt = self.work / "lessons.safetensors", self.effort.lessons_per_prompt
        pools = [self.pictures, lessons(self.base, self.prompts, file, per_prompt=per_prompt)]
        return Teacher(self.base / "vae", self.prompts, pools, self.work / "sight", self.effort)

    def comparisons(self, pairs: str, seed: int) -> dict[str, Comparisons]:
        """The comparisons for training and validation."""
        found = {
            split: prepared_comparisons(self.prepared.pairs_file(split), self.pictures)
            for split in ("train", "validation")
        }
        if pairs == "base":
            evaluate, file = self.config.evaluate, self.work / "base.safetensors"
            steps = evaluate.samplers[evaluate.deciding].steps
            own = like_pictures(self.base, self.prompts, file, per_prompt=RECIPE.pictures_per_prompt, steps=steps)
            found["train"] = rings(own, Generator().manual_seed(seed))
        return found

    def rows(self, cell: Cell) -> list[dict[str, Any]]:
        """The cell's results: a row for each method against the base, and for the first method against each other."""
        folder = self.work / cell.name
        file = folder / f"{'-'.join(self.methods)}.json"
        if not file.exists():
            write_json(file, self._measure(cell, folder, self._train(cell, folder)))
        return read_json(file)

    def _train(self, cell: Cell, folder: Path) -> Config:
        """Make the labels, the initial and the step-aware preference model, and align; the cell's configuration."""
        if not (folder / "labels.json").exists():
            target = Workspace(self.config, folder).prepared
            splits = self.comparisons(cell.pairs, cell.seed)
            copy_prompts(self.prepared, target)
            pairs = target.pairs_file("train").parent
            write_json(folder / "labels.json", write_pairs(splits, pairs, cell.opinion, seed=cell.seed))
        config = self.config.model_copy(update={"seed": cell.seed})
        if any(settings.scorer for settings in config.align.values()):
            start = self.work / "preference-models" / cell.labelling
            if not start.exists():
                self.teacher.teach(cell.opinion, start, seed=cell.seed)
            preference = config.preference_models["pixel"].model_copy(
                update={"start_from": str(start), "checkpoint": None, "candidates": None}
            )
            config = config.model_copy(update={"preference_models": {"pixel": preference}})
            if not Workspace(config, folder).preference_model("pixel").exists():
                preference_stage.run(config, "pixel", root=folder, tracker=NullTracker())
        for name in self.methods:
            if not Workspace(config, folder).aligned(name, cell.seed).exists():
                align.run(config, name, cell.seed, root=folder, tracker=NullTracker())
        return config

    def _measure(self, cell: Cell, folder: Path, config: Config) -> list[dict[str, Any]]:
        labels = read_json(folder / "labels.json")
        base = self.scorer.scores("base", None, "test")
        scores, chosen = {}, {}
        for name in self.methods:
            label = f"{cell.name}-{name}"
            chosen[name] = self.scorer.choose(label, Workspace(config, folder).checkpoints(name, cell.seed))
            scores[name] = self.scorer.scores(label, chosen[name], "test")
        first, *others = self.methods
        compared = [(name, "base", scores[name], base) for name in self.methods]
        compared += [(first, name, scores[first], scores[name]) for name in others]
        rows = []
        for name, other, of_name, of_other in compared:
            for score, found in self.scorer.differences(of_name, of_other, "test").items():
                if score in (config.evaluate.primary, *config.evaluate.guarded):
                    rows.append(
                        {
                            "preference_steps": self.effort.preference_steps,
                            "pairs": cell.pairs,
                            "share": cell.share,
                            "temperature": cell.temperature,
                            "seed": cell.seed,
                            "method": name,
                            "against": other,
                            "score": score,
                            **{key: value for key, value in vars(found).items() if key != "ties"},
                            "checkpoint": chosen[name].name,
                            **labels,
                        }
                    )
        return rows


def copy_prompts(prepared: Prepared, target: Prepared) -> None:
    """Copy the prepared prompts, which are the same for every cell."""
    for split in ("train", "validation", "test"):
        with atomic_path(target.prompts_file(split)) as temporary:
            temporary.write_bytes(prepared.prompts_file(split).read_bytes())


@mistakes_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.share_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=at_least(0, float, most=1), nargs="+", default=[0.05, 0.1, 0.25, 0.5, 0.7])
    parser.add_argument("--temperatures", type=at_least(0, float), nargs="+", default=[RECIPE.temperature])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), help="the first is also compared with the others"
    )
    parser.add_argument(
        "--pairs", nargs="+", choices=["prepared", "base"], default=["prepared"], help="whose pictures are compared"
    )
    parser.add_argument(
        "--preference-steps", type=int, default=RECIPE.preference_steps, help="to teach a cell's opinion by"
    )
    parser.add_argument(
        "--step-aware-steps", type=int, help="of the stage train_preference (default: the profile's own)"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/share_sweep.csv"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, four prompts: does it run?")
    options = parser.parse_args(arguments)
    set_up_libraries()
    effort = Effort(preference_steps=options.preference_steps)
    config = load_config()
    if options.step_aware_steps is not None:
        settings = config.preference_models["pixel"].model_copy(update={"steps": options.step_aware_steps})
        config = config.model_copy(update={"preference_models": {"pixel": settings}})
    if options.quick:
        effort = Effort(sight_pictures=96, sight_steps=4, lessons_per_prompt=1, preference_steps=4)
        config = shortened(config)
    sweep = Sweep(config, options.methods, effort=effort, root=Path())
    rows: list[dict[str, Any]] = []
    grid = itertools.product(options.pairs, options.shares, options.temperatures, options.seeds)
    for pairs, share, temperature, seed in grid:
        rows += sweep.rows(Cell(share, temperature, seed, pairs))
        write_csv(options.out, rows)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
