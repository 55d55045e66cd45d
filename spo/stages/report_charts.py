"""Which charts the report shows, each with a caption and the words that stand in for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spo.evaluation.plots import Line, Span, interval_chart, line_chart
from spo.stages.report_inputs import Inputs, Row
from spo.stages.report_results import BASE, CONTRAST, Results


@dataclass(frozen=True)
class Chart:
    name: str
    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class History:
    """A quantity of every update: its column, its title, what it means, and a level worth a line."""

    column: str
    title: str
    caption: str
    level: tuple[str, float] | None = None


HISTORY = (
    History("loss", "Loss", "At log 2 the policy is still the reference.", ("log 2", math.log(2))),
    History("logit", "Logit of the pair", "Above zero the policy leans to the winner more than the reference does.",
            ("no preference", 0.0)),
    History("accuracy", "Pairs with a logit above zero", "Share of an update's pairs."),
    History("log_ratio_win", "Log ratio of the winner", "Policy over reference: above zero it became likelier."),
    History("log_ratio_lose", "Log ratio of the loser", "Policy over reference: below zero it became unlikelier."),
    History("clipped", "Ratios clipped", "Share that has moved as far as the clip range lets it."),
    History("kept", "Pairs kept", "Share of branched steps whose margin passed the threshold."),
    History("margin", "Margin", "How much the preference model prefers winner to loser, from 0 to 1."),
    History("score", "Score of candidates", "Mean score by the preference model, the judge in training."),
)  # fmt: skip


def gain_charts(results: Results) -> list[Chart]:
    """The gain over the base with its interval, a chart for each metric of the verdict."""
    charts = []
    for metric in results.main:
        spans = [
            Span(f"{column}, eta {eta:g}", gain["difference"], gain["low"], gain["high"], _slot(results, column))
            for eta in results.etas
            for column in results.columns[1:]
            if (gain := results.gain(eta, column, metric)) is not None
        ]
        told = "; ".join(f"{s.label} {s.value:+z.3f}, from {s.low:+z.3f} to {s.high:+z.3f}" for s in spans)
        svg = interval_chart(f"gain-{metric}", spans, x_label=f"{metric.capitalize()}: gain over the base")
        caption = "Point and 95% interval over prompts. A line that crosses zero is no clear change."
        charts.append(Chart(f"gain-{metric}", svg, f"Gain in {metric} over the base: {told}.", caption))
    return charts


def validation_charts(results: Results, rows: Sequence[Row]) -> list[Chart]:
    """Scores on the validation prompts against the compute that training had used by then."""
    chosen = ", ".join(f"{name} {checkpoint}" for name, checkpoint in results.values.get("checkpoint", {}).items())
    caption = "Each point is a saved checkpoint." + (f" Chosen: {chosen}." if chosen else "")
    charts = []
    for metric in results.main:
        if not any(metric in row for row in rows):
            continue
        base = [row[metric] for row in rows if row["column"] == BASE]
        lines = []
        for name in results.methods:
            points = sorted((row["unet_forwards"], row[metric]) for row in rows if row["column"] == name)
            points = [(0.0, base[0])] * bool(base and points and points[0][0] > 0) + points
            x, y = zip(*points, strict=True) if points else ((), ())
            lines.append(Line(name, x, y, markers=True, slot=_slot(results, name)))
        level = ("base", base[0]) if base else None
        title = f"{metric.capitalize()} on validation prompts"
        name = f"validation-{metric}"
        svg = line_chart(name, lines, x_label="UNet forward passes in training", y_label=title, level=level)
        charts.append(Chart(name, svg, _told(title, lines), caption))
    return charts


def history_charts(results: Results, history: dict[str, list[Row]]) -> list[Chart]:
    """What training looked like, update by update: pale as it was, bold its running mean."""
    charts = []
    for item in HISTORY:
        lines = [
            Line(name, range(1, len(run) + 1), [row[item.column] for row in run], True, slot=_slot(results, name))
            for name, run in history.items()
            if run and item.column in run[0]
        ]
        if lines:
            svg = line_chart(f"history-{item.column}", lines, x_label="update", y_label=item.title, level=item.level)
            charts.append(Chart(f"history-{item.column}", svg, _told(item.title, lines), item.caption))
    return charts


def timestep_charts(results: Results, timesteps: dict[str, list[Row]]) -> list[Chart]:
    """Where in denoising the pairs come from."""
    kept, margin = [], []
    for name, rows in timesteps.items():
        if rows:
            t, slot = [row["timestep"] for row in rows], _slot(results, name)
            shares = [row["kept"] / row["branched"] if row["branched"] else math.nan for row in rows]
            kept.append(Line(name, t, shares, markers=True, slot=slot))
            margin.append(Line(name, t, [row["margin"] for row in rows], markers=True, slot=slot))
    if not kept:
        return []
    said = "Share of branched steps that gave a pair; noise is on the left."
    return [
        _over_timesteps("timestep-kept", "Pairs kept by timestep", said, kept),
        _over_timesteps("timestep-margin", "Margin by timestep", "Mean margin; noise is on the left.", margin),
    ]


def accuracy_charts(rows: Sequence[Row]) -> list[Chart]:
    """How often the preference model agrees with held-out labels, at each amount of noise."""
    if not rows:
        return []
    lines = []
    for slot, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        measured = [row for row in rows if row["model"] == model]
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
        "accuracy": accuracy_charts(inputs.accuracy),
    }


def _over_timesteps(
    name: str, title: str, caption: str, lines: list[Line], *, level: tuple[str, float] | None = None
) -> Chart:
    lines = [Line(line.label, *_sorted(line.x, line.y), markers=True, slot=line.slot) for line in lines]
    svg = line_chart(name, lines, x_label="timestep", y_label=title, level=level, reverse=True)
    return Chart(name, svg, _told(title, lines), caption)


def _sorted(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    points = sorted(zip(x, y, strict=True), reverse=True)
    return [a for a, _ in points], [b for _, b in points]


def _slot(results: Results, column: str) -> int:
    return len(results.methods) if column == CONTRAST else results.methods.index(column)


def _told(title: str, lines: Sequence[Line]) -> str:
    """The chart in words: where each line begins and ends."""
    parts = []
    for line in lines:
        known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        if known:
            (x_0, y_0), (x_1, y_1) = known[0], known[-1]
            parts.append(f"{line.label} goes from {y_0:.3g} at {x_0:g} to {y_1:.3g} at {x_1:g}")
    return f"{title}: " + ("; ".join(parts) if parts else "no values") + "."
