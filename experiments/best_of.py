"""What a user gets without training: the best of N pictures of the base, chosen by the trained preference model.

    python -m experiments.best_of [--preference-model pixel] [--nums 4 12] [--out bench/results/best_of.csv]

Makes N pictures of each test prompt with the sampler that decides, the evaluation's own picture among them, and takes
the one that the preference model scores highest. Writes rows with the gain over the base's own picture, and with what
each method of the last `python -m spo evaluate` is better by.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import at_least, mistakes_in_one_line
from experiments.workbench import cells
from spo.config import Config, ScoringConfig, load_config
from spo.errors import SpoError
from spo.evaluation.image_scorer import ImageScorer
from spo.evaluation.model_variants import BASE, ModelVariant, tasks
from spo.evaluation.statistics import paired_difference
from spo.metrics.metric import Scores
from spo.models.generate import from_bytes
from spo.runtime.files import write_csv
from spo.runtime.libraries import set_up_libraries
from spo.training.preference_scorer import LoadedPreference
from spo.workspace import Workspace

Row = dict[str, Any]


def best_of(config: Config, preference_model: str, nums: Sequence[int], *, root: Path) -> dict[int, Scores]:
    """Scores (prompts,) by name of the best of N pictures of each test prompt, for each N; 1 is the base's own."""
    evaluate, most = config.evaluate, max(nums)
    wanted = tasks(Workspace(config, root).prepared, "test", evaluate.num_prompts, most, evaluate.seed)
    images = ImageScorer(config, root)
    preference = LoadedPreference(config, preference_model, root, images.model).scorer(ScoringConfig())
    now = torch.zeros((), dtype=torch.long)
    preferred: list[Tensor] = []
    seen: list[Scores] = []
    for batch in images.batches(ModelVariant(BASE), wanted, evaluate.deciding, split="best of", images=True):
        text = preference.encode([task.prompt for task in batch.tasks])
        preferred.append(preference.score_images(from_bytes(batch.images), text, now).cpu())
        seen.append(batch.scores)
    by_prompt = torch.cat(preferred).view(-1, most)  # (prompts, most)
    scores = {name: torch.cat([part[name] for part in seen]).view(-1, most) for name in seen[0]}
    chosen = {num: by_prompt[:, :num].argmax(dim=1, keepdim=True) for num in (1, *nums)}
    return {num: {name: each.gather(1, best)[:, 0] for name, each in scores.items()} for num, best in chosen.items()}


def evaluated(config: Config, names: Sequence[str], *, root: Path) -> dict[str, Scores]:
    """Scores (prompts,) of each method's first picture and training seed, by the last evaluation."""
    file = Workspace(config, root).evaluate / "scores.csv"
    if not file.is_file():
        raise SpoError(f"{file} is missing; run `python -m spo evaluate`")
    with file.open(newline="", encoding="utf-8") as opened:
        rows = [row for row in csv.DictReader(opened) if row["sampler"] == config.evaluate.deciding]
    first, seed = [row for row in rows if row["image_index"] == "0"], float(config.training_seeds[0])
    found = {}
    for method in config.methods:
        own = [row for row in first if row["column"] == method and float(row["training_seed"]) == seed]
        own.sort(key=lambda row: int(row["prompt_index"]))
        found[method] = {name: torch.tensor([float(row[name]) for row in own]) for name in names}
    return found


def compared(one: Scores, other: Scores, names: Sequence[str], samples: int) -> Mapping[str, Any]:
    prompts = range(len(one[names[0]]))
    differences = {
        name: paired_difference(one[name].numpy(), other[name].numpy(), prompts, samples=samples) for name in names
    }
    return cells(differences, names)


@mistakes_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.best_of", description=__doc__.splitlines()[0])
    parser.add_argument("--preference-model", default="pixel", help="a key of the profile's preference_models")
    parser.add_argument("--nums", type=at_least(2), nargs="+", default=[4, 12], help="pictures of a prompt")
    parser.add_argument("--out", type=Path, default=Path("bench/results/best_of.csv"))
    options = parser.parse_args(arguments)
    set_up_libraries()
    config, root = load_config(), Path()
    names, samples = (config.evaluate.primary, *config.evaluate.guarded), config.evaluate.bootstrap_samples
    methods = evaluated(config, names, root=root)
    best = best_of(config, options.preference_model, options.nums, root=root)
    rows: list[Row] = []
    for num in options.nums:
        label = f"best of {num}"
        rows.append({"column": label, "against": BASE, **compared(best[num], best[1], names, samples)})
        for method, scores in methods.items():
            rows.append({"column": method, "against": label, **compared(scores, best[num], names, samples)})
    write_csv(options.out, rows)
    for row in rows:
        changes = ", ".join(
            f"{name} {row[f'{name}_difference']:+.3f} [{row[f'{name}_low']:+.3f}, {row[f'{name}_high']:+.3f}]"
            for name in names
        )
        print(f"{row['column']} minus {row['against']}: {changes}")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
