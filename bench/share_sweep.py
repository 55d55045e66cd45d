"""SPO's and Diffusion-DPO's gains against the share of finish in the labels, and against the labels' noise.

    python -m bench.share_sweep [--shares 0.05 0.1 0.25 0.5 0.7] [--temperatures 0.3] [--seeds 0] [--quick]

The claim that it tests: generic labels are dominated by what a picture shows, so the signal of finish in a pair of
different pictures drowns, while candidates of one x_t differ in little else. For each cell the prepared pairs are
labelled anew by an opinion with that share and noise; the clean-image preference model is taught that opinion from one
that knows no preference; then come the pipeline's own train_preference and align stages. Gains are of the test
prompts, at the checkpoint that the pipeline's rule takes on the validation prompts.

A cell's finished parts are kept under .cache/bench, so that a killed sweep goes on; the table is written anew after
every cell.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import CLIPModel, CLIPTokenizer

from bench.relabel import Pictures, read_pictures, relabel
from bench.workbench import Ruler, adopt, place
from spo.config import Config, load_config
from spo.errors import SpoError
from spo.files import atomic_path, read_json, write_json
from spo.pretrain.clip import save_clip
from spo.pretrain.preference import GROUP, Group, Opinion, train_preference
from spo.pretrain.recipe import RECIPE
from spo.progress import progress
from spo.stages import align
from spo.stages import train_preference as preference_stage
from spo.tables import write_csv
from spo.tracking import NullTracker

BLANK = Path(".cache/pretrain/sight")  # left by `python -m spo pretrain`
METHODS = ("spo", "diffusion_dpo")


@dataclass(frozen=True)
class Cell:
    share: float  # of the opinion's variance that is owed to finish
    temperature: float  # of its logistic error, in standard deviations of utility
    seed: int  # of labels and trainings

    @property
    def name(self) -> str:
        return f"share-{self.share:g}_temperature-{self.temperature:g}_seed-{self.seed}"

    @property
    def opinion(self) -> Opinion:
        return Opinion(self.share, self.temperature, RECIPE.tie)


class Sweep:
    """The cells' common ground: the pictures, the CLIP that knows no preference yet, the measure."""

    def __init__(self, config: Config, methods: Sequence[str], blank: Path, *, start_steps: int, root: Path):
        missing = [name for name in methods if name not in config.align]
        if missing:
            raise SpoError(f"profile {config.profile} has no method {missing}; it has {sorted(config.align)}")
        if not blank.is_dir():
            raise SpoError(
                f"{blank} is missing: a CLIP without preferences; run `python -m spo pretrain` or name one by --blank"
            )
        self.config = config
        self.methods = methods
        self.blank = blank
        self.start_steps = start_steps
        self.work = place("share_sweep", config, {"blank": str(blank), "start_steps": start_steps}, root=root)
        adopt("prepare", config, source=root, target=self.work)
        self.prepared = self.work / config.folder("prepare")
        self.pictures: Pictures = read_pictures(self.prepared)
        self.ruler = Ruler(config, self.prepared, self.work / "scores")

    def rows(self, cell: Cell) -> list[dict[str, Any]]:
        """The cell's results: a row for each method against the base, and one for the first against each other."""
        folder = self.work / cell.name
        if not (folder / "rows.json").exists():
            write_json(folder / "rows.json", self._measure(cell, folder, self._train(cell, folder)))
        return read_json(folder / "rows.json")

    def _train(self, cell: Cell, folder: Path) -> Config:
        """Labels, start, preference model and methods; the cell's configuration."""
        if not (folder / "labels.json").exists():
            target = folder / self.config.folder("prepare") / "preferences"
            write_json(
                folder / "labels.json",
                relabel(self.prepared, target, self.pictures, cell.opinion, seed=cell.seed),
            )
            adopt_prompts(self.prepared, folder / self.config.folder("prepare"))
        if not (folder / "start").exists():
            self._teach(cell, folder / "start")
        preference = self.config.train_preference.model_copy(
            update={"start_from": str(folder / "start"), "checkpoint": None}
        )
        config = self.config.model_copy(update={"train_preference": preference, "seed": cell.seed})
        if not (folder / config.folder("train_preference")).exists():
            preference_stage.run(config, root=folder, tracker=NullTracker())
        for name in self.methods:
            if not (folder / config.aligned(name, cell.seed)).exists():
                align.run(config, name, cell.seed, root=folder, tracker=NullTracker())
        return config

    def _teach(self, cell: Cell, target: Path) -> None:
        """The clean-image preference model: the blank CLIP, taught the cell's opinion on the training prompts."""
        clip, tokenizer = CLIPModel.from_pretrained(self.blank).train(), CLIPTokenizer.from_pretrained(self.blank)
        known = (self.prepared / "prompts" / "train.txt").read_text(encoding="utf-8").splitlines()
        steps = train_preference(
            clip,
            tokenizer,
            [groups_of(self.pictures, set(known), self.pictures.utility(cell.share), RECIPE.preference_prompts)],
            cell.opinion,
            steps=self.start_steps,
            learning_rate=RECIPE.preference_rate,
            generator=Generator().manual_seed(cell.seed),
        )
        with progress(total=self.start_steps, label=f"start of {cell.name}") as bar:
            for measured in steps:
                bar.update(**measured)
        save_clip(clip.eval(), tokenizer, target)

    def _measure(self, cell: Cell, folder: Path, config: Config) -> list[dict[str, Any]]:
        labels = read_json(folder / "labels.json")
        base = self.ruler.scores("base", None, "test")
        scores, chosen = {}, {}
        for name in self.methods:
            label = f"{cell.name}-{name}"
            chosen[name] = self.ruler.choose(label, folder / config.aligned(name, cell.seed))
            scores[name] = self.ruler.scores(label, chosen[name], "test")
        first, *others = self.methods
        compared = [(name, "base", scores[name], base) for name in self.methods]
        compared += [(first, name, scores[first], scores[name]) for name in others]
        rows = []
        for name, other, of_name, of_other in compared:
            for score, found in self.ruler.differences(of_name, of_other, "test").items():
                if score in (config.evaluate.primary, *config.evaluate.guarded):
                    rows.append(
                        {
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


def groups_of(pictures: Pictures, prompts: set[str], utility: Tensor, num: int) -> Callable[[Generator], Group]:
    """Draws `num` of these prompts, GROUP pictures each; SpoError where none has as many."""
    members: dict[str, list[int]] = {}
    for i, prompt in enumerate(pictures.prompts):
        if prompt in prompts:
            members.setdefault(prompt, []).append(i)
    groups = [(prompt, torch.tensor(rows)) for prompt, rows in sorted(members.items()) if len(rows) >= GROUP]
    if not groups:
        raise SpoError(f"no training prompt has the {GROUP} pictures in the prepared pairs that a lesson takes")

    def draw(generator: Generator) -> Group:
        chosen = [groups[i] for i in torch.randint(len(groups), (num,), generator=generator).tolist()]
        rows = torch.cat([rows[torch.randperm(len(rows), generator=generator)[:GROUP]] for _, rows in chosen])
        return Group(pictures.pixels[rows], [prompt for prompt, _ in chosen], utility[rows])

    return draw


def adopt_prompts(prepared: Path, target: Path) -> None:
    """The same prompts for every cell."""
    for split in ("train", "validation", "test"):
        with atomic_path(target / "prompts" / f"{split}.txt") as temporary:
            temporary.write_bytes((prepared / "prompts" / f"{split}.txt").read_bytes())


def quickened(config: Config) -> Config:
    """As little of everything as runs at all."""
    align_settings = {
        name: settings.model_copy(update={"epochs": 1, "checkpoints": 2, "watch": None})
        for name, settings in config.align.items()
    }
    small = {"num_prompts": 4, "num_validation_prompts": 4, "bootstrap_samples": 200}
    preference = config.train_preference.model_copy(update={"steps": 4, "evaluate_pairs": 16})
    return config.model_copy(
        update={
            "align": align_settings,
            "evaluate": config.evaluate.model_copy(update=small),
            "train_preference": preference,
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.share_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5, 0.7])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[RECIPE.temperature])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), help="the first is also compared with the others"
    )
    parser.add_argument("--blank", type=Path, default=BLANK, help=f"a CLIP that knows no preference ({BLANK})")
    parser.add_argument("--out", type=Path, default=Path("bench/results/share_sweep.csv"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, four prompts: does it run?")
    options = parser.parse_args(arguments)
    steps = 4 if options.quick else RECIPE.preference_steps
    try:
        config = quickened(load_config()) if options.quick else load_config()
        sweep = Sweep(config, options.methods, options.blank, start_steps=steps, root=Path())
        rows: list[dict[str, Any]] = []
        for share, temperature, seed in itertools.product(options.shares, options.temperatures, options.seeds):
            rows += sweep.rows(Cell(share, temperature, seed))
            write_csv(options.out, rows)
        print(options.out)
    except SpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
