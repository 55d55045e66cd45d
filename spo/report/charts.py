"""The charts of the report, each with a caption and a description in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from spo.report.cost import CURRENCIES, by_checkpoint
from spo.report.inputs import Inputs, OfSeeds, PreferenceModel, Row
from spo.report.plots import Line, Span, interval_chart, line_chart
from spo.report.results import BASE, Results


@dataclass(frozen=True)
class Chart:
    name: str
    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Quantity:
    """A quantity that training records: its column, title, meaning, and a level to mark."""

    column: str
    title: str
    caption: str
    level: tuple[str, float] | None = None


HISTORY = (
    Quantity("loss", "Loss", "At log 2 the policy prefers neither of the two more than the reference does.",
            ("log 2", math.log(2))),
    Quantity("logit", "Logit of the pair", "Above zero the policy prefers the winner more than the reference does.",
            ("no preference", 0.0)),
    Quantity("accuracy", "Pairs with a logit above zero", "Share of an update's pairs."),
    Quantity("log_ratio_win", "Log ratio of the winner", "Policy over reference: above zero it became likelier."),
    Quantity("log_ratio_lose", "Log ratio of the loser", "Policy over reference: below zero it became unlikelier."),
    Quantity("clipped", "Ratios clipped", "Share of ratios at the limit of the clip range."),
    Quantity("kept", "Pairs kept", "Share of branched steps whose margin passed the threshold."),
    Quantity("margin", "Margin", "How much the preference model prefers winner to loser, from 0 to 1."),
    Quantity("score", "Score of candidates", "Mean score by the preference model."),
)  # fmt: skip

WATCH = (
    Quantity("preference_gain", "Gain by the preference model", "In standard deviations; training uses it.",
            ("start", 0.0)),
    Quantity("independent_gain", "Gain by an independent metric", "In standard deviations; training never uses it.",
            ("start", 0.0)),
    Quantity("gap", "Gap", "The first less the second; large if the policy games the preference model.",
            ("none", 0.0)),
)  # fmt: skip


def gain_charts(results: Results) -> list[Chart]:
    """The gain over the base with its interval: a chart for each metric of the verdict."""
    charts = []
    for metric in results.main:
        spans = [
            Span(f"{column}, {sampler}", gain["difference"], gain["low"], gain["high"], results.slot(column))
            for sampler in results.samplers
            for column in results.columns[1:]
            if (gain := results.gain(sampler, column, metric)) is not None
        ]
        description = "; ".join(f"{s.label} {s.value:+z.3f}, from {s.low:+z.3f} to {s.high:+z.3f}" for s in spans)
        svg = interval_chart(f"gain-{metric}", spans, x_label=f"{metric.capitalize()}: gain over the base")
        caption = "Point and 95% interval. A line that crosses zero is no clear change."
        charts.append(Chart(f"gain-{metric}", svg, f"Gain in {metric} over the base: {description}.", caption))
    return charts


def validation_charts(results: Results, rows: Sequence[Row]) -> list[Chart]:
    """Scores on the validation prompts against the compute of training so far, in both units."""
    charts = []
    base_row = next((row for row in rows if row["column"] == BASE), {})
    seeds = ", the mean of the training seeds" if results.num_seeds > 1 else ""
    for metric in results.main:
        base = base_row.get(metric)
        for currency, unit in CURRENCIES.items():
            title = f"{metric.capitalize()} on validation prompts"
            charts += _line_chart(
                f"validation-{metric}-{currency.replace('_', '-')}",
                title,
                f"Each point is a saved checkpoint{seeds}.",
                [line for name in results.methods for line in _curve(results, rows, name, metric, currency, base)],
                x_label=unit,
                subject=f"{title} against {unit}",
                level=None if base is None else ("base", base),
            )
    return charts


def _curve(
    results: Results, rows: Sequence[Row], name: str, metric: str, currency: str, base: float | None
) -> list[Line]:
    """A method's mean over its seeds, from the base on, and each seed if there are several."""
    points = [[(row[currency], row[metric]) for row in at] for at in by_checkpoint(rows, name)]
    if not points:
        return []
    start = [] if base is None else [(0.0, base)]
    seeds = [[*start, *own] for own in zip(*points, strict=True)]
    mean = start + [(fmean(x for x, _ in at), fmean(y for _, y in at)) for at in points]

    def line(points: Sequence[tuple[float, float]], *, faint: bool) -> Line:
        x, y = [x for x, _ in points], [y for _, y in points]
        return Line(name, x, y, markers=not faint, slot=results.slot(name), faint=faint)

    return [*(line(own, faint=True) for own in seeds if len(seeds) > 1), line(mean, faint=False)]


def history_charts(results: Results, history: Mapping[str, OfSeeds]) -> list[Chart]:
    """Training update by update: values pale, their running mean bold; of several seeds only the first bold."""
    charts = []
    for item in HISTORY:
        lines: list[Line] = []
        for name, seeds in history.items():
            for rows in seeds.values():
                y = [row.get(item.column, math.nan) for row in rows]
                if any(map(math.isfinite, y)):
                    faint = any(line.label == name for line in lines)
                    x = range(1, len(y) + 1)
                    lines.append(Line(name, x, y, smooth=True, slot=results.slot(name), faint=faint))
        name = f"history-{item.column}"
        charts += _line_chart(name, item.title, item.caption, lines, x_label="update", level=item.level)
    return charts


def watch_charts(results: Results, watch: Mapping[str, OfSeeds]) -> list[Chart]:
    """Gains on fixed prompts during training: by the preference model, by an independent metric, and their gap."""
    charts = []
    for item in WATCH:
        lines = [
            Line(name, [row["unet_forwards"] for row in rows], [row.get(item.column, math.nan) for row in rows],
                 markers=i == 0, slot=results.slot(name), faint=i > 0)
            for name, seeds in watch.items()
            for i, rows in enumerate(seeds.values())
            if rows
        ]  # fmt: skip
        name, x_label = f"watch-{item.column.replace('_', '-')}", CURRENCIES["unet_forwards"]
        charts += _line_chart(name, item.title, item.caption, lines, x_label=x_label, level=item.level)
    return charts


def timestep_charts(results: Results, timesteps: Mapping[str, OfSeeds]) -> list[Chart]:
    """The pairs by the timestep that they come from."""
    kept, margin, gap = [], [], []
    for name, seeds in timesteps.items():
        at: dict[float, list[Row]] = {}
        for rows in seeds.values():
            for row in rows:
                at.setdefault(row["timestep"], []).append(row)
        if not at:
            continue
        t, slot = sorted(at, reverse=True), results.slot(name)
        kept.append(Line(name, t, [_kept_share(at[each]) for each in t], markers=True, slot=slot))
        margin.append(Line(name, t, [_mean(at[each], "margin") for each in t], markers=True, slot=slot))
        apart = [_mean(at[each], "log_ratio_win") - _mean(at[each], "log_ratio_lose") for each in t]
        if any(map(math.isfinite, apart)):
            gap.append(Line(name, t, apart, markers=True, slot=slot))
    of_kept = "Share of branched steps that gave a pair; noise is on the left."
    of_gap = "Winner's less loser's: zero where the policy has learned nothing."
    return [
        *_over_timesteps("timestep-kept", "Pairs kept by timestep", of_kept, kept),
        *_over_timesteps("timestep-margin", "Margin by timestep", "Mean margin; noise is on the left.", margin),
        *_over_timesteps("timestep-log-ratio", "Log-ratio gap by timestep", of_gap, gap),
    ]


def preference_charts(models: Mapping[str, PreferenceModel]) -> list[Chart]:
    """How often each preference model agrees with held-out labels, and with a metric on candidates, by timestep."""
    of_labels = "Share of held-out pairs ordered as labelled; noise is on the left."
    of_candidates = "Share of steps at which an independent metric prefers the model's best candidate to its worst."
    chance = ("chance", 0.5)
    accuracy, candidates = [], []
    for slot, (name, model) in enumerate(models.items()):
        for state in dict.fromkeys(row["model"] for row in model.accuracy):
            rows = [row for row in model.accuracy if row["model"] == state]
            accuracy.append(_line(f"{name}, {state}", rows, "accuracy", slot=2 * slot + (state == "start")))
        if model.candidates:
            candidates.append(_line(name, model.candidates, "agreement", slot=2 * slot))
    return [
        *_over_timesteps("accuracy", "Agreement with held-out labels", of_labels, accuracy, level=chance),
        *_over_timesteps("candidates", "Agreement on candidates", of_candidates, candidates, level=chance),
    ]


def _line(label: str, rows: Sequence[Row], column: str, *, slot: int) -> Line:
    """A line over the timesteps, the noisiest first."""
    rows = sorted(rows, key=lambda row: -row["timestep"])
    return Line(label, [row["timestep"] for row in rows], [row[column] for row in rows], markers=True, slot=slot)


def all_charts(results: Results, inputs: Inputs) -> dict[str, list[Chart]]:
    """The charts of each section of the page."""
    return {
        "gain": gain_charts(results),
        "validation": validation_charts(results, inputs.validation),
        "history": history_charts(results, inputs.history),
        "timesteps": timestep_charts(results, inputs.timesteps),
        "watch": watch_charts(results, inputs.watch),
        "preference": preference_charts(inputs.preference_models),
    }


def _over_timesteps(
    name: str, title: str, caption: str, lines: Sequence[Line], *, level: tuple[str, float] | None = None
) -> list[Chart]:
    return _line_chart(name, title, caption, lines, x_label="timestep", level=level, reverse=True)


def _line_chart(
    name: str, title: str, caption: str, lines: Sequence[Line], *, x_label: str, subject: str = "", **options: Any
) -> list[Chart]:
    """A chart, whose description has the first and last point of each line; no chart without lines."""
    if not lines:
        return []
    parts = []
    for line in lines:
        known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        if known and not line.faint:
            (x_0, y_0), (x_1, y_1) = known[0], known[-1]
            parts.append(f"{line.label} goes from {y_0:.3g} at {x_0:g} to {y_1:.3g} at {x_1:g}")
    description = f"{subject or title}: {'; '.join(parts) or 'no values'}."
    return [Chart(name, line_chart(name, lines, x_label=x_label, y_label=title, **options), description, caption)]


def _kept_share(rows: Sequence[Row]) -> float:
    branched = sum(row["branched"] for row in rows)
    return sum(row["kept"] for row in rows) / branched if branched else math.nan


def _mean(rows: Sequence[Row], column: str) -> float:
    known = [row[column] for row in rows if math.isfinite(row.get(column, math.nan))]
    return fmean(known) if known else math.nan
