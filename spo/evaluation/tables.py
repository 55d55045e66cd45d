"""The tables of the evaluation: scores of each image, means with intervals, and comparisons."""

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
    """All scores of the base, of the control or of a method, with one sampler."""

    name: str
    sampler: str
    training_seeds: tuple[int | None, ...]  # (None,) without training
    scores: dict[str, Tensor]  # each (seeds, n)

    @property
    def num_seeds(self) -> int:
        """0 without training."""
        return sum(seed is not None for seed in self.training_seeds)


def score_rows(columns: Sequence[Column], tasks: Sequence[Task]) -> list[Row]:
    """A row for each image."""
    return [
        {
            "column": column.name,
            "training_seed": "" if seed is None else seed,
            "sampler": column.sampler,
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
            "sampler": column.sampler,
            "column": column.name,
            "metric": metric,
            **asdict(mean_interval(values.numpy(), prompts, samples=samples)),
            "training_seeds": column.num_seeds,
        }
        for column in columns
        for metric, values in column.scores.items()
    ]


def comparison_rows(columns: Sequence[Column], prompts: Sequence[str], *, samples: int) -> list[Row]:
    """Paired differences and win rates with 95% intervals, for the pairs of `compared`; prompts: (n,)."""
    rows = []
    for sampler in dict.fromkeys(column.sampler for column in columns):
        own = {column.name: column for column in columns if column.sampler == sampler}
        for name, against in compared(list(own)):
            a, b = own[name], own[against]
            rows += [
                {
                    "sampler": sampler,
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
    """Every column against the base; each method against the methods after it, and against the control."""
    methods = [name for name in names if name not in (BASE, CONTROL)]
    against_base = [(name, BASE) for name in names if name != BASE]
    against_control = [(name, CONTROL) for name in methods if CONTROL in names]
    return [*against_base, *combinations(methods, 2), *against_control]


def compact(
    means: Sequence[Row], comparisons: Sequence[Row], *, sampler: str, primary: str, guarded: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The main figures with one sampler; the tables hold all.

    For each column: means, gains over the base and win rate of the primary score. For each pair of methods: the same
    as differences.
    """
    table: dict[str, dict[str, float]] = {}
    for row in means:
        if row["sampler"] == sampler and row["metric"] in (primary, *guarded):
            table.setdefault(row["column"], {})[row["metric"]] = round(row["mean"], 5)
    for row in comparisons:
        metric, against = row["metric"], row["against"]
        if row["sampler"] != sampler or metric not in (primary, *guarded) or against == CONTROL:
            continue
        name, kind = (row["column"], "gain") if against == BASE else (f"{row['column']}_vs_{against}", "difference")
        figures = {f"{metric}_{kind}": row["difference"]}
        figures |= {f"{metric}_{kind}_{end}": row[end] for end in ("low", "high")}
        if metric == primary:
            figures |= {f"{metric}_{key}": row[key] for key in ("win_rate", "win_rate_low", "win_rate_high")}
        table.setdefault(name, {}).update({key: round(value, 5) for key, value in figures.items()})
    return table
