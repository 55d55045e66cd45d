"""The charts of the report, each with a caption and a description in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from spo.report.cost import CURRENCIES, by_checkpoint
from spo.report.inputs import Inputs, OfSeeds, Row
from spo.report.plots import Line, Span, interval_chart, line_chart
from spo.report.results import BASE, Results


@dataclass(frozen=True)
class Chart:
    name: str
    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class History:
    """A quantity of every update: its column, title, meaning, and a level to mark."""

    column: str
    title: str
    caption: str
    level: tuple[str, float] | None = None


HISTORY = (
    History("loss", "Loss", "At log 2 the policy is still the reference.", ("log 2", math.log(2))),
    History("logit", "Logit of the pair", "Above zero the policy prefers the winner more than the reference does.",
            ("no preference", 0.0)),
    History("accuracy", "Pairs with a logit above zero", "Share of an update's pairs."),
    History("log_ratio_win", "Log ratio of the winner", "Policy over reference: above zero it became likelier."),
    History("log_ratio_lose", "Log ratio of the loser", "Policy over reference: below zero it became unlikelier."),
    History("clipped", "Ratios clipped", "Share of ratios at the limit of the clip range."),
    History("kept", "Pairs kept", "Share of branched steps whose margin passed the threshold."),
    History("margin", "Margin", "How much the preference model prefers winner to loser, from 0 to 1."),
    History("score", "Score of candidates", "Mean score by the preference model."),
)  # fmt: skip


WATCH = (
    History("preference_gain", "Gain by the preference model", "In standard deviations; training uses it.",
            ("start", 0.0)),
    History("independent_gain", "Gain by an independent metric", "In standard deviations; training never uses it.",
            ("start", 0.0)),
    History("gap", "Gap", "The first less the second; large if the policy games the preference model.",
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
    for metric in results.main:
        for currency, unit in CURRENCIES.items():
            base = base_row.get(metric)
            lines = [
                line
                for name in results.methods
                for line in _curve(results, rows, name, metric, currency, base)
                if line.x
            ]
            if not lines:
                continue
            title = f"{metric.capitalize()} on validation prompts"
            name = f"validation-{metric}-{currency.replace('_', '-')}"
            level = None if base is None else ("base", base)
            svg = line_chart(name, lines, x_label=unit, y_label=title, level=level)
            seeds = ", the mean of the training seeds" if results.num_seeds > 1 else ""
            caption = f"Each point is a saved checkpoint{seeds}."
            charts.append(Chart(name, svg, _description(f"{title} against {unit}", lines), caption))
    return charts


def _curve(
    results: Results, rows: Sequence[Row], name: str, metric: str, currency: str, base: float | None
) -> list[Line]:
    """A method's mean over its seeds, from the base on, and each seed if there are several."""
    together = by_checkpoint(rows, name)
    start = [] if base is None else [(0.0, base)]
    points = [[(row[currency], row[metric]) for row in at] for at in together]
    seeds = [start + list(own) for own in zip(*points, strict=True)] if points else []
    mean = start + [(fmean(x for x, _ in at), fmean(y for _, y in at)) for at in points]
    faint = [Line(name, *_split(own), slot=results.slot(name), faint=True) for own in seeds if len(seeds) > 1]
    return [*faint, Line(name, *_split(mean), markers=True, slot=results.slot(name))] if points else []


def history_charts(results: Results, history: Mapping[str, OfSeeds]) -> list[Chart]:
    """Training update by update: values pale, their running mean bold."""
    charts = []
    for item in HISTORY:
        lines = _over_training(results, history, item.column)
        if lines:
            svg = line_chart(f"history-{item.column}", lines, x_label="update", y_label=item.title, level=item.level)
            charts.append(Chart(f"history-{item.column}", svg, _description(item.title, lines), item.caption))
    return charts


def _over_training(results: Results, history: Mapping[str, OfSeeds], column: str) -> list[Line]:
    lines = []
    for name, seeds in history.items():
        for rows in seeds.values():
            if rows and any(math.isfinite(row.get(column, math.nan)) for row in rows):
                y = [row.get(column, math.nan) for row in rows]
                lines.append(Line(name, range(1, len(rows) + 1), y, smooth=True, slot=results.slot(name)))
        if len(seeds) > 1:  # the first seed bold, the others faint
            own = [i for i, line in enumerate(lines) if line.label == name]
            for i in own[1:]:
                lines[i] = replace(lines[i], faint=True)
    return lines


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
        if lines:
            name = f"watch-{item.column.replace('_', '-')}"
            svg = line_chart(name, lines, x_label=CURRENCIES["unet_forwards"], y_label=item.title, level=item.level)
            charts.append(Chart(name, svg, _description(item.title, lines), item.caption))
    return charts


def timestep_charts(results: Results, timesteps: Mapping[str, OfSeeds]) -> list[Chart]:
    """The pairs by the timestep that they come from."""
    lines: dict[str, list[Line]] = {"kept": [], "margin": [], "log_ratio": []}
    for name, seeds in timesteps.items():
        at: dict[float, list[Row]] = {}
        for rows in seeds.values():
            for row in rows:
                at.setdefault(row["timestep"], []).append(row)
        if not at:
            continue
        t = sorted(at, reverse=True)
        shares = [_share(at[each], "kept", "branched") for each in t]
        lines["kept"].append(Line(name, t, shares, markers=True, slot=results.slot(name)))
        lines["margin"].append(Line(name, t, [_mean(at[each], "margin") for each in t], markers=True,
                                    slot=results.slot(name)))  # fmt: skip
        apart = [_mean(at[each], "log_ratio_win") - _mean(at[each], "log_ratio_lose") for each in t]
        if any(map(math.isfinite, apart)):
            lines["log_ratio"].append(Line(name, t, apart, markers=True, slot=results.slot(name)))
    texts = {
        "kept": ("Pairs kept by timestep", "Share of branched steps that gave a pair; noise is on the left."),
        "margin": ("Margin by timestep", "Mean margin; noise is on the left."),
        "log_ratio": ("Log-ratio gap by timestep", "Winner's less loser's: zero where the policy has learned nothing."),
    }
    return [
        _over_timesteps(f"timestep-{name.replace('_', '-')}", *texts[name], found)
        for name, found in lines.items()
        if found
    ]


def accuracy_charts(rows: Sequence[Row]) -> list[Chart]:
    """How often the preference model agrees with held-out labels, by timestep."""
    if not rows:
        return []
    lines = []
    for slot, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        measured = sorted((row for row in rows if row["model"] == model), key=lambda row: -row["timestep"])
        t, accuracy = [row["timestep"] for row in measured], [row["accuracy"] for row in measured]
        lines.append(Line(model, t, accuracy, markers=True, slot=slot))
    caption = "Share of held-out pairs ordered as labelled; noise is on the left."
    return [_over_timesteps("accuracy", "Agreement with held-out labels", caption, lines, level=("chance", 0.5))]


def all_charts(results: Results, inputs: Inputs) -> dict[str, list[Chart]]:
    """The charts of each section of the page."""
    return {
        "gain": gain_charts(results),
        "validation": validation_charts(results, inputs.validation),
        "history": history_charts(results, inputs.history),
        "timesteps": timestep_charts(results, inputs.timesteps),
        "watch": watch_charts(results, inputs.watch),
        "accuracy": accuracy_charts(inputs.accuracy),
    }


def _over_timesteps(
    name: str, title: str, caption: str, lines: list[Line], *, level: tuple[str, float] | None = None
) -> Chart:
    svg = line_chart(name, lines, x_label="timestep", y_label=title, level=level, reverse=True)
    return Chart(name, svg, _description(title, lines), caption)


def _share(rows: Sequence[Row], part: str, whole: str) -> float:
    total = sum(row[whole] for row in rows)
    return sum(row[part] for row in rows) / total if total else math.nan


def _mean(rows: Sequence[Row], column: str) -> float:
    known = [row[column] for row in rows if math.isfinite(row.get(column, math.nan))]
    return fmean(known) if known else math.nan


def _split(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _description(title: str, lines: Sequence[Line]) -> str:
    """The chart in words: the first and last point of each line."""
    parts = []
    for line in lines:
        known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        if known and not line.faint:
            (x_0, y_0), (x_1, y_1) = known[0], known[-1]
            parts.append(f"{line.label} goes from {y_0:.3g} at {x_0:g} to {y_1:.3g} at {x_1:g}")
    return f"{title}: " + ("; ".join(parts) if parts else "no values") + "."
