"""The evaluation's figures as tables: an image a row, means with intervals, and every comparison that is asked for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from spo.evaluation.model_variants import BASE, CONTROL, Task
from spo.evaluation.statistics import mean_interval, paired_difference

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """All scores of the base, of the control or of a method, under one sampler."""

    name: str
    eta: float
    training_seeds: tuple[int | None, ...]  # (None,) of what was not trained
    scores: dict[str, Tensor]  # each (seeds, n)

    @property
    def num_seeds(self) -> int:
        """0 of what was not trained."""
        return sum(seed is not None for seed in self.training_seeds)


def score_rows(columns: Sequence[Column], tasks: Sequence[Task]) -> list[Row]:
    """One row an image."""
    return [
        {
            "column": column.name,
            "training_seed": "" if seed is None else seed,
            "eta": column.eta,
            "prompt_index": task.prompt_index,
            "image_index": task.image_index,
            "prompt": task.prompt,
            **{name: values[k, i].item() for name, values in column.scores.items()},
        }
        for column in columns
        for k, seed in enumerate(column.training_seeds)
        for i, task in enumerate(tasks)
    ]


def mean_rows(columns: Sequence[Column], prompts: Sequence[str], *, samples: int) -> list[Row]:
    """Each column's mean in each metric, with its 95% interval; prompts: (n,)."""
    return [
        {
            "eta": column.eta,
            "column": column.name,
            "metric": metric,
            **asdict(mean_interval(values.numpy(), prompts, samples=samples)),
            "training_seeds": column.num_seeds,
        }
        for column in columns
        for metric, values in column.scores.items()
    ]


def comparison_rows(columns: Sequence[Column], prompts: Sequence[str], *, samples: int) -> list[Row]:
    """Paired differences and win rates with 95% intervals, of the pairs that `compared` names; prompts: (n,)."""
    rows = []
    for eta in dict.fromkeys(column.eta for column in columns):
        at_eta = {column.name: column for column in columns if column.eta == eta}
        for name, against in compared(list(at_eta)):
            a, b = at_eta[name], at_eta[against]
            rows += [
                {
                    "eta": eta,
                    "column": name,
                    "against": against,
                    "metric": metric,
                    **asdict(paired_difference(a.scores[metric].numpy(), b.scores[metric].numpy(), prompts,
                                               samples=samples)),
                    "training_seeds": max(a.num_seeds, b.num_seeds),
                }
                for metric in a.scores
            ]  # fmt: skip
    return rows


def compared(names: Sequence[str]) -> list[tuple[str, str]]:
    """Everything against the base, each method against those after it, and against the control."""
    methods = [name for name in names if name not in (BASE, CONTROL)]
    against_base = [(name, BASE) for name in names if name != BASE]
    against_control = [(name, CONTROL) for name in methods if CONTROL in names]
    return [*against_base, *combinations(methods, 2), *against_control]


def compact(
    means: Sequence[Row], comparisons: Sequence[Row], *, eta: float, primary: str, guarded: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The few figures that experiments are told apart by, under the deciding sampler; the tables have all.

    Of each column the means, the gains over the base and the win rate of the primary score; of each pair of methods
    the same, as differences.
    """
    table: dict[str, dict[str, float]] = {}
    for row in means:
        if row["eta"] == eta and row["metric"] in (primary, *guarded):
            table.setdefault(row["column"], {})[row["metric"]] = round(row["mean"], 5)
    for row in comparisons:
        metric, against = row["metric"], row["against"]
        if row["eta"] != eta or metric not in (primary, *guarded) or against == CONTROL:
            continue
        name, difference = (
            (row["column"], "gain") if against == BASE else (f"{row['column']}_vs_{against}", "difference")
        )
        figures = {f"{metric}_{difference}": row["difference"]}
        figures |= {f"{metric}_{difference}_{end}": row[end] for end in ("low", "high")}
        if metric == primary:
            figures |= {f"{metric}_{key}": row[key] for key in ("win_rate", "win_rate_low", "win_rate_high")}
        table.setdefault(name, {}).update({key: round(value, 5) for key, value in figures.items()})
    return table
