"""Charts as inline SVG in the page's colours, for light and dark mode.

Series differ in colour, dash and marker. A page sets the colours as --series-0 to --series-5; the default is LIGHT.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter

LIGHT = ("#005f99", "#b34700", "#00704f", "#a3387c", "#7a5a00", "#4a4fc4")
SLOTS = tuple(f"#01020{4 + i}" for i in range(len(LIGHT)))  # stand for the series' colours until the SVG is written
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK = "#010203"  # stands for the page's text colour until the SVG is written
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from the configuration
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


LEGEND_WIDTH = 54  # letters beside each other below a chart, with 5 for each line's sample


@dataclass(frozen=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]  # nan if unknown
    smooth: bool = False  # draw the running mean over the pale values
    markers: bool = False
    slot: int = 0  # the number of its colour, dash and marker: one name has one slot in all charts
    faint: bool = False  # thin and without a name: one of several that another line averages


@dataclass(frozen=True)
class Span:
    """An estimate with its interval, a row of an interval chart."""

    label: str
    value: float
    low: float
    high: float
    slot: int = 0


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    level: tuple[str, float] | None = None,
    reverse: bool = False,
) -> str:
    """Lines over a common x as `<svg>`; `level` is a labelled horizontal line, `reverse` reverses x.

    `name` sets the SVG's ids apart from those of other charts on the page.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = _figure(2.4)
        for line in lines:
            _draw(axes, line)
        if level is not None:
            axes.axhline(level[1], color=INK, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.7)
            axes.annotate(level[0], (1, level[1]), (0, 2), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", va="bottom", fontsize=8)  # fmt: skip
        if reverse:
            axes.invert_xaxis()
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 3M
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left", fontsize=10, pad=8)
        axes.margins(y=0.12)
        labels = {line.label for line in lines if not line.faint}
        if len(labels) > 1:
            columns = max(1, min(3, LEGEND_WIDTH // (5 + max(map(len, labels)))))
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.27), ncols=columns, borderaxespad=0)
        return _svg(figure, name)


def interval_chart(name: str, spans: Sequence[Span], *, x_label: str) -> str:
    """Estimates with their intervals, one row each, against a line at zero, as `<svg>`."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = _figure(0.9 + 0.34 * len(spans))
        for row, span in enumerate(spans):
            colour, marker = SLOTS[span.slot % len(SLOTS)], MARKERS[span.slot % len(MARKERS)]
            axes.plot([span.low, span.high], [row, row], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([span.value], [row], color=colour, marker=marker, markersize=6)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(spans)), [span.label for span in spans])
        axes.set_ylim(len(spans) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        longest = max((len(span.label) for span in spans), default=0)  # long labels leave little width for the ticks
        axes.locator_params(axis="x", nbins=5 if longest < 20 else 3)
        axes.set_title(x_label, loc="left", fontsize=10, pad=8)
        return _svg(figure, name)


def running_mean(y: Sequence[float]) -> np.ndarray:
    """Mean over a centred window of about a tenth of the series, without nan."""
    values = np.asarray(y, dtype=np.float64)
    window = np.ones(min(2 * (len(values) // 20) + 1, len(values)))
    known = np.isfinite(values)
    count = np.convolve(known, window, mode="same")
    total = np.convolve(np.where(known, values, 0), window, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _figure(height: float) -> tuple[Figure, Axes]:
    layout = ConstrainedLayoutEngine(w_pad=0.12)  # inches; the page's font may be wider than the one laid out with
    figure = Figure(figsize=(3.5, height), layout=layout)
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.grid(axis="both", color=INK, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _draw(axes: Axes, line: Line) -> None:
    colour = SLOTS[line.slot % len(SLOTS)]
    dash = DASHES[line.slot % len(DASHES)]
    marker = MARKERS[line.slot % len(MARKERS)] if line.markers else ""
    y = running_mean(line.y) if line.smooth else line.y
    if line.faint:
        axes.plot(line.x, y, color=colour, linewidth=0.9, alpha=0.45)
        return
    if line.smooth:
        axes.plot(line.x, line.y, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(line.x, y, color=colour, linestyle=dash, linewidth=1.8, marker=marker, markersize=5, label=line.label)


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    for i, (slot, colour) in enumerate(zip(SLOTS, LIGHT, strict=True)):
        svg = svg.replace(slot, f"var(--series-{i}, {colour})")
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" xmlns="http://www.w3.org/2000/svg" '
                 r'xmlns:xlink="http://www.w3.org/1999/xlink">', svg, count=1)  # fmt: skip
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"('[^'\"]*', )+(?:sans-serif|serif|monospace)", "system-ui, sans-serif", svg)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
