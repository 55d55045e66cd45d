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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import quiet, table
from spo.config import Config, SpoConfig, load_config
from spo.core.noise import KeyedNoise
from spo.core.rollout import rollout
from spo.core.selection import select_pairs, take
from spo.core.types import Scorer, Selection
from spo.device import best_device
from spo.errors import SpoError
from spo.evaluation.metrics import build_metrics, score
from spo.evaluation.statistics import mean_interval
from spo.models.load import build
from spo.preference.checkpoint import load_preference_model
from spo.preference.score import PreferenceScorer
from spo.tables import write_csv

Row = dict[str, Any]


class Recorder:
    """A scorer that remembers what it was shown and what it said."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer
        self.seen: list[tuple[int, Tensor, Tensor]] = []  # t, images (k * b, 3, H, W), scores (k * b,)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.scorer.encode(prompts)

    def __call__(self, images: Tensor, text: Tensor, t: Tensor) -> Tensor:
        scores = self.scorer(images, text, t)
        self.seen.append((int(t), images.cpu(), scores.cpu()))
        return scores


def measure(config: Config, scorer: Scorer, prompts: Sequence[str], settings: SpoConfig) -> list[Row]:
    """A row for each timestep that candidates are judged at, and for all of them together."""
    model = build(config.model, config.sampling, best_device())
    needed = (config.evaluate.primary, *config.evaluate.guarded)
    judges = build_metrics(config.evaluate.metrics, model.device, needed=needed)
    recorder = Recorder(scorer)
    noise = KeyedNoise(config.evaluate.seed, 0, range(len(prompts)), model.timesteps.device)
    with torch.no_grad():
        for _ in rollout(
            model,
            recorder,
            model.encode(prompts),
            recorder.encode(prompts),
            candidates=settings.candidates,
            first_step=settings.first_step,
            branch_steps=settings.branch_steps,
            threshold=settings.threshold,
            noise=noise,
        ):
            pass
    agreements: dict[int, dict[str, Tensor]] = {}
    kept: dict[int, Tensor] = {}
    for t, images, scores in recorder.seen:
        selection = select_pairs(scores.unflatten(0, (settings.candidates, -1)), threshold=settings.threshold)
        found = score(judges, images, [*prompts] * settings.candidates)
        by_candidate = {name: found[name].unflatten(0, (settings.candidates, -1)) for name in needed}
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.judge_order", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="folders (default: what train_preference left)")
    parser.add_argument("--method", default="spo", help="key of the profile's `align` whose settings are taken")
    parser.add_argument("--prompts", type=int, help="of the validation prompts (default: all)")
    parser.add_argument("--candidates", type=int, help="(default: the method's own)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/judge_order.csv"))
    options = parser.parse_args(arguments)
    quiet()
    try:
        config = load_config()
        settings = config.align.get(options.method)
        if not isinstance(settings, SpoConfig):
            raise SpoError(
                f"profile {config.profile} has no SPO called {options.method}; it has {sorted(config.align)}"
            )
        if options.candidates is not None:
            settings = SpoConfig.model_validate({**settings.model_dump(), "candidates": options.candidates})
        file = Path(config.folder("prepare")) / "prompts" / "validation.txt"
        if not file.is_file():
            raise SpoError(f"{file} is missing; run `python -m spo prepare`")
        prompts = file.read_text(encoding="utf-8").splitlines()[: options.prompts]
        everything: list[Row] = []
        for folder in options.models or [Path(config.folder("train_preference")) / "model"]:
            scorer = PreferenceScorer(load_preference_model(folder), device=best_device())
            rows = measure(config, scorer, prompts, settings)
            everything += [{"model": str(folder), **row} for row in rows]
            print(f"{folder}\n\n{show(rows, (config.evaluate.primary, *config.evaluate.guarded))}\n")
            write_csv(options.out, everything)
        print(options.out)
    except SpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
