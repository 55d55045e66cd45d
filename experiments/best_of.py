"""What a user gets without training: the best of N pictures of the base, chosen by the trained preference model.

    python -m experiments.best_of [--preference-model pixel] [--nums 4 12] [--out bench/results/best_of.csv]

Makes N pictures of each test prompt with the sampler that decides, the evaluation's own picture among them, and takes
the one that the preference model scores highest. Writes rows with the gain over the base's own picture, and with what
each method of the last `python -m spo evaluate` is better by.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import at_least, mistakes_in_one_line
from experiments.workbench import CheckpointScorer, cells
from spo.config import Config, load_config
from spo.evaluation.image_scorer import ImageScorer, joined
from spo.evaluation.model_variants import BASE, ModelVariant, tasks
from spo.metrics.metric import Scores
from spo.models.generate import from_bytes
from spo.report.inputs import read_csv
from spo.runtime.files import write_csv
from spo.runtime.libraries import set_up_libraries
from spo.training.preference_scorer import load_scorer
from spo.workspace import Workspace

Row = dict[str, Any]


def best_of(config: Config, preference_model: str, nums: Sequence[int], images: ImageScorer) -> dict[int, Scores]:
    """Scores (prompts,) by name of the best of N pictures of each test prompt, for each N; 1 is the base's own."""
    evaluate, root, most = config.evaluate, Path(), max(nums)
    wanted = tasks(Workspace(config, root).prepared, "test", evaluate.num_prompts, most, evaluate.seed)
    preference = load_scorer(config, preference_model, root, images.model)
    now = torch.zeros((), dtype=torch.long)
    preferred: list[Tensor] = []
    seen: list[Scores] = []
    for batch in images.batches(ModelVariant(BASE), wanted, evaluate.deciding, split="best of", images=True):
        text = preference.encode([task.prompt for task in batch.tasks])
        preferred.append(preference.score_images(from_bytes(batch.images), text, now).cpu())
        seen.append(batch.scores)
    by_prompt = torch.cat(preferred).view(-1, most)  # (prompts, most)
    scores = {name: each.view(-1, most) for name, each in joined(seen).items()}
    chosen = {num: by_prompt[:, :num].argmax(dim=1, keepdim=True) for num in (1, *nums)}
    return {num: {name: each.gather(1, best)[:, 0] for name, each in scores.items()} for num, best in chosen.items()}


def evaluated(config: Config, names: Sequence[str]) -> dict[str, Scores]:
    """Scores (prompts,) of each method's first picture and training seed, by the last evaluation."""
    columns = ("sampler", "column", "training_seed", "prompt_index", "image_index")
    table = read_csv(Workspace(config, Path()).evaluate / "scores.csv", "evaluate", columns)
    rows = [row for row in table if row["sampler"] == config.evaluate.deciding and row["image_index"] == 0]
    found = {}
    for method in config.methods:
        own = [row for row in rows if row["column"] == method and row["training_seed"] == config.training_seeds[0]]
        own.sort(key=lambda row: row["prompt_index"])
        found[method] = {name: torch.tensor([row[name] for row in own]) for name in names}
    return found


@mistakes_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.best_of", description=__doc__.splitlines()[0])
    parser.add_argument("--preference-model", default="pixel", help="a key of the profile's preference_models")
    parser.add_argument("--nums", type=at_least(2), nargs="+", default=[4, 12], help="pictures of a prompt")
    parser.add_argument("--out", type=Path, default=Path("bench/results/best_of.csv"))
    options = parser.parse_args(arguments)
    set_up_libraries()
    config = load_config()
    names = (config.evaluate.primary, *config.evaluate.guarded)
    methods = evaluated(config, names)
    scorer = CheckpointScorer(config, Path())
    best = best_of(config, options.preference_model, options.nums, scorer.image_scorer)

    def row(column: str, one: Scores, against: str, other: Scores) -> Row:
        changes = scorer.differences({name: one[name] for name in names}, other, "test")
        return {"column": column, "against": against, **cells(changes, names)}

    rows: list[Row] = []
    for num in options.nums:
        label = f"best of {num}"
        rows.append(row(label, best[num], BASE, best[1]))
        rows += [row(method, scores, label, best[num]) for method, scores in methods.items()]
    write_csv(options.out, rows)
    for each in rows:
        changes = ", ".join(
            f"{name} {each[f'{name}_difference']:+.3f} [{each[f'{name}_low']:+.3f}, {each[f'{name}_high']:+.3f}]"
            for name in names
        )
        print(f"{each['column']} minus {each['against']}: {changes}")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
