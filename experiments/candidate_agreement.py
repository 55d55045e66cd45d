"""Measure whether a preference model orders the candidates of one x_t correctly, as SPO needs.

    python -m experiments.candidate_agreement [MODEL ...] [--prompts 69] [--candidates 4]

MODEL is a folder of a step-aware preference model (default: the one that the method names). The base is
sampled on the validation prompts as in SPO. At each step SPO would keep some pairs of the model's best and worst
candidate; an independent metric decides which of the two is better. The table has the share of pairs on which both
agree, by timestep and score, with 95% intervals over prompts; 0.5 is chance. The pipeline's accuracy on pairs of
different images says little about this, because such pairs differ in more than finish.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.markdown import table
from bench.measure import at_least, mistakes_in_one_line
from spo.config import Config, SpoConfig, load_config
from spo.core.noise import KeyedNoise
from spo.core.rollout import rollout
from spo.core.selection import select_pairs, take
from spo.core.types import Candidates, Scorer, Selection
from spo.errors import SpoError
from spo.evaluation.statistics import mean_interval
from spo.metrics.metric import Scores, build_metrics
from spo.metrics.metric import score as metric_scores
from spo.models.load import build
from spo.preference.checkpoint import load_preference_model
from spo.preference.score import PreferenceScorer
from spo.runtime.device import best_device
from spo.runtime.files import write_csv
from spo.runtime.libraries import set_up_libraries
from spo.workspace import Workspace

Row = dict[str, Any]


class Recorder:
    """A scorer that records its scores of images, and those of independent metrics."""

    def __init__(self, scorer: Scorer, others: Callable[[Tensor], Scores]):
        self.scorer = scorer
        self.others = others
        self.seen: list[tuple[float, Tensor, Scores]] = []  # t, scores (k, b), and (k * b,) of each metric by name

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.scorer.encode(prompts)

    def __call__(self, candidates: Candidates) -> Tensor:
        scores = self.scorer(candidates)
        self.seen.append((candidates.t, scores.cpu(), self.others(candidates.images.flatten(0, 1))))
        return scores


def measure(config: Config, scorer: Scorer, prompts: Sequence[str], settings: SpoConfig) -> list[Row]:
    """A row for each timestep at which candidates are scored, and for all of them together."""
    model = build(config.model, config.sampling, best_device())
    needed = (config.evaluate.primary, *config.evaluate.guarded)
    metrics = build_metrics(config.evaluate.metrics, model.device, needed=needed)
    k = settings.candidates
    recorder = Recorder(scorer, lambda images: metric_scores(metrics, images, [*prompts] * k))
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
            noise=noise,
        ):
            pass
    agreements: dict[float, dict[str, Tensor]] = {}
    kept: dict[float, Tensor] = {}
    for t, scores, found in recorder.seen:
        selection = select_pairs(scores, threshold=settings.threshold)
        by_candidate = {name: found[name].unflatten(0, (k, -1)) for name in needed}
        agreements[t] = {name: _agreement(each, selection) for name, each in by_candidate.items()}
        kept[t] = selection.keep
    rows = [_row(t, agreements[t], kept[t], list(prompts)) for t in kept]
    together = {name: torch.cat([agreements[t][name] for t in kept]) for name in needed}
    return [*rows, _row("all", together, torch.cat(list(kept.values())), [*prompts] * len(kept))]


def _agreement(scores: Tensor, chosen: Selection) -> Tensor:
    """For each prompt 1 if the win has the higher of scores (k, b), 0 if the lose has, 0.5 if they are equal."""
    return (take(scores, chosen.win) - take(scores, chosen.lose)).sign() / 2 + 0.5


def _row(t: float | str, agreements: Mapping[str, Tensor], kept: Tensor, prompts: Sequence[str]) -> Row:
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
    parser = argparse.ArgumentParser(
        prog="python -m experiments.candidate_agreement", description=__doc__.splitlines()[0]
    )
    parser.add_argument("models", nargs="*", type=Path, help="folders (default: the one that the method names)")
    parser.add_argument(
        "--method",
        default="spo",
        help="an SPO of the profile's `align`, for its steps, candidates, threshold and preference model's timestep",
    )
    parser.add_argument("--prompts", type=at_least(2), help="of the validation prompts (default: all)")
    parser.add_argument("--candidates", type=at_least(2), help="(default: the method's own)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/candidate_agreement.csv"))
    options = parser.parse_args(arguments)
    set_up_libraries()
    config = load_config()
    settings = config.align.get(options.method)
    if not isinstance(settings, SpoConfig):
        raise SpoError(f"profile {config.profile} has no SPO called {options.method}; it has {sorted(config.align)}")
    if options.candidates is not None:
        settings = SpoConfig.model_validate({**settings.model_dump(), "candidates": options.candidates})
    workspace = Workspace(config)
    prompts = workspace.prepared.prompts("validation", options.prompts)
    everything: list[Row] = []
    for folder in options.models or [workspace.preference_model(settings.scorer)]:
        timestep = 0 if config.preference_models[settings.scorer].blind else settings.scoring.timestep
        scorer = PreferenceScorer(load_preference_model(folder), device=best_device(), timestep=timestep)
        rows = measure(config, scorer, prompts, settings)
        everything += [{"model": str(folder), **row} for row in rows]
        print(f"{folder}\n\n{show(rows, (config.evaluate.primary, *config.evaluate.guarded))}\n")
        write_csv(options.out, everything)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
