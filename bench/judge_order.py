"""What SPO needs of its judge: whether it puts candidates of one x_t in the right order.

    python -m bench.judge_order [MODEL ...] [--prompts 69] [--candidates 4]

MODEL is a folder of a step-aware preference model (default: the one that `python -m spo train_preference` left). The
base is sampled on the validation prompts as SPO samples it. Of the model's best and worst candidate at each step, where
SPO would keep that pair, an independent metric tells which is better. The share of pairs in which both agree is told by
the timestep of the judgement and by score, with 95% intervals over prompts; .5 is chance. Accuracy on pairs of
different pictures, which the pipeline measures, says little of this: such pairs differ in much that is easily told.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.markdown import table
from bench.measure import at_least, mistakes_in_one_line, quiet
from spo.config import Config, SpoConfig, load_config
from spo.core.noise import KeyedNoise
from spo.core.rollout import rollout
from spo.core.selection import select_pairs, take
from spo.core.types import Scorer, Selection
from spo.device import best_device
from spo.errors import SpoError
from spo.evaluation.metrics import Scores, build_metrics
from spo.evaluation.metrics import score as metric_scores
from spo.evaluation.statistics import mean_interval
from spo.methods.spo import BlindScorer
from spo.models.load import build
from spo.preference.checkpoint import load_preference_model
from spo.preference.score import PreferenceScorer
from spo.tables import write_csv

Row = dict[str, Any]


class Recorder:
    """A scorer that remembers what it said of images, and what independent metrics say."""

    def __init__(self, scorer: Scorer, others: Callable[[Tensor], Scores]):
        self.scorer = scorer
        self.others = others
        self.seen: list[tuple[int, Tensor, Scores]] = []  # t, scores (k * b,) of the scorer, and of the metrics by name

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.scorer.encode(prompts)

    def __call__(self, images: Tensor, text: Tensor, t: Tensor) -> Tensor:
        scores = self.scorer(images, text, t)
        self.seen.append((int(t), scores.cpu(), self.others(images)))
        return scores


def measure(config: Config, scorer: Scorer, prompts: Sequence[str], settings: SpoConfig) -> list[Row]:
    """A row for each timestep that candidates are judged at, and for all of them together."""
    model = build(config.model, config.sampling, best_device())
    needed = (config.evaluate.primary, *config.evaluate.guarded)
    judges = build_metrics(config.evaluate.metrics, model.device, needed=needed)
    k = settings.candidates
    recorder = Recorder(scorer, lambda images: metric_scores(judges, images, [*prompts] * k))
    noise = KeyedNoise(config.evaluate.seed, 0, range(len(prompts)), model.timesteps.device)
    with torch.no_grad():
        for _ in rollout(
            model,
            recorder,
            model.encode(prompts),
            recorder.encode(prompts),
            candidates=k,
            first_step=settings.first_step,
            branch_steps=settings.branch_steps,
            threshold=settings.threshold,
            noise=noise,
        ):
            pass
    agreements: dict[int, dict[str, Tensor]] = {}
    kept: dict[int, Tensor] = {}
    for t, scores, found in recorder.seen:
        selection = select_pairs(scores.unflatten(0, (k, -1)), threshold=settings.threshold)
        by_candidate = {name: found[name].unflatten(0, (k, -1)) for name in needed}
        agreements[t] = {name: _agreement(each, selection) for name, each in by_candidate.items()}
        kept[t] = selection.keep
    rows = [_row(t, agreements[t], kept[t], list(prompts)) for t in kept]
    together = {name: torch.cat([agreements[t][name] for t in kept]) for name in needed}
    return [*rows, _row("all", together, torch.cat(list(kept.values())), [*prompts] * len(kept))]


def _agreement(scores: Tensor, chosen: Selection) -> Tensor:
    """1 where the win of each prompt has the higher of scores (k, b), 0 where the lose has, .5 where they are equal."""
    return (take(scores, chosen.win) - take(scores, chosen.lose)).sign() / 2 + 0.5


def _row(t: int | str, agreements: Mapping[str, Tensor], kept: Tensor, prompts: Sequence[str]) -> Row:
    groups = [prompt for prompt, keep in zip(prompts, kept.tolist(), strict=True) if keep]
    row: Row = {"t": t, "pairs": len(groups)}
    for name, values in agreements.items():
        if len(set(groups)) > 1:
            found = mean_interval(values[kept].numpy(), groups)
            row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        else:
            row |= dict.fromkeys((name, f"{name}_low", f"{name}_high"), "")
    return row


def show(rows: Sequence[Row], names: Sequence[str]) -> str:
    def cell(row: Row, name: str) -> str:
        return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]" if row[name] != "" else ""

    lines = [[str(row["t"]), str(row["pairs"]), *(cell(row, name) for name in names)] for row in rows]
    return table([["t", "pairs kept", *names], *lines])


@mistakes_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.judge_order", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="folders (default: what train_preference left)")
    parser.add_argument(
        "--method",
        default="spo",
        help="an SPO of the profile's `align`: its steps, candidates, threshold, what its judge is told",
    )
    parser.add_argument("--prompts", type=at_least(2), help="of the validation prompts (default: all)")
    parser.add_argument("--candidates", type=at_least(2), help="(default: the method's own)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/judge_order.csv"))
    options = parser.parse_args(arguments)
    quiet()
    config = load_config()
    settings = config.align.get(options.method)
    if not isinstance(settings, SpoConfig):
        raise SpoError(f"profile {config.profile} has no SPO called {options.method}; it has {sorted(config.align)}")
    if options.candidates is not None:
        settings = SpoConfig.model_validate({**settings.model_dump(), "candidates": options.candidates})
    file = Path(config.folder("prepare")) / "prompts" / "validation.txt"
    if not file.is_file():
        raise SpoError(f"{file} is missing; run `python -m spo prepare`")
    prompts = file.read_text(encoding="utf-8").splitlines()[: options.prompts]
    everything: list[Row] = []
    for folder in options.models or [Path(config.folder("train_preference")) / "model"]:
        scorer: Scorer = PreferenceScorer(load_preference_model(folder), device=best_device())
        told = 0 if config.train_preference.blind else settings.judged_at
        scorer = scorer if told is None else BlindScorer(scorer, told)
        rows = measure(config, scorer, prompts, settings)
        everything += [{"model": str(folder), **row} for row in rows]
        print(f"{folder}\n\n{show(rows, (config.evaluate.primary, *config.evaluate.guarded))}\n")
        write_csv(options.out, everything)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
