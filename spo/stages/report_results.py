"""What the evaluation found, in sentences and figures that follow from its intervals and from nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spo.errors import DataError

BASE, CONTRAST = "base", "contrast"
INTERVAL = "95% interval"
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Results:
    """The nested metrics.json of `evaluate`, read by sampler, column and metric."""

    values: Mapping[str, Any]
    methods: tuple[str, ...]
    etas: tuple[float, ...]  # the first one decides
    num_prompts: int
    primary: str = "aesthetic"  # the score that is to rise
    guarded: tuple[str, ...] = ("alignment",)  # scores that must not be lost by it

    def __post_init__(self) -> None:
        for eta in self.etas:
            sampler = self.values.get(eta_key(eta), {})
            for column in (BASE, *self.methods, *(f"{name}_vs_base" for name in self.methods)):
                if column not in sampler:
                    raise DataError(
                        f"the metrics of evaluate have no {eta_key(eta)}.{column}; run `python -m spo evaluate` again"
                    )
                missing = [metric for metric in self.main if metric not in sampler[column]]
                if missing:
                    raise DataError(
                        f"evaluate has not measured {', '.join(missing)}, only {', '.join(self.metrics)}; "
                        "name measured scores in evaluate.primary and evaluate.guarded"
                    )

    @property
    def main(self) -> tuple[str, ...]:
        """The scores of the verdict."""
        return (self.primary, *self.guarded)

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that images were scored by."""
        return tuple(key for key, value in self._sampler(self.etas[0])[BASE].items() if isinstance(value, Mapping))

    @property
    def columns(self) -> tuple[str, ...]:
        control = (CONTRAST,) if f"{CONTRAST}_vs_base" in self._sampler(self.etas[0]) else ()
        return (BASE, *self.methods, *control)

    @property
    def contrast_factor(self) -> float | None:
        return self._sampler(self.etas[0]).get(CONTRAST, {}).get("factor")

    def score(self, eta: float, column: str, metric: str) -> Figures | None:
        """mean, low, high; None where that was not measured."""
        return self._sampler(eta).get(column, {}).get(metric)

    def gain(self, eta: float, column: str, metric: str) -> Figures | None:
        """difference, low, high, win_rate, ... over the base; None for the base itself."""
        return self._sampler(eta).get(f"{column}_vs_base", {}).get(metric)

    def gains(self, method: str) -> Mapping[str, Figures]:
        """A method's gains in all metrics at the deciding sampler."""
        return self._sampler(self.etas[0])[f"{method}_vs_base"]

    def _sampler(self, eta: float) -> Mapping[str, Any]:
        return self.values[eta_key(eta)]


def eta_key(eta: float) -> str:
    return f"eta_{eta:g}"


def direction(gain: Figures) -> int:
    """1 or -1 where the whole interval lies above or below zero, else 0."""
    return (gain["low"] > 0) - (gain["high"] < 0)


def verdicts(results: Results) -> dict[str, list[str]]:
    """Of each method its sentences: the gain, what became of the guard, and what contrast alone would do."""
    found = {}
    for name in results.methods:
        gains = results.gains(name)
        gain = gains[results.primary]
        sentences = [_gain_sentence(name, results.primary, gain, results.num_prompts)]
        sentences += [_guard_sentence(name, metric, gains[metric]) for metric in results.guarded]
        control = results.gain(results.etas[0], CONTRAST, results.primary)
        if control is not None:
            sentences.append(_contrast_sentence(name, results.primary, gain, control, results.contrast_factor))
        found[name] = sentences
    return found


def _gain_sentence(name: str, metric: str, gain: Figures, num_prompts: int) -> str:
    where = f"on {num_prompts} prompts never trained on, winning {gain['win_rate']:.0%} of pairs"
    match direction(gain):
        case 0:
            return (
                f"{name} shows no clear change of {metric} over the base: {gain['difference']:+z.3f}, "
                f"and the {_interval(gain)} includes zero, {where}."
            )
        case sign:
            verb = "raises" if sign > 0 else "lowers"
            return f"{name} {verb} {metric} by {abs(gain['difference']):.3f} ({_interval(gain, sign)}) {where}."


def _guard_sentence(name: str, metric: str, gain: Figures) -> str:
    match direction(gain):
        case 0:
            change = f"{gain['difference']:+z.3f} ({_interval(gain)}, includes zero)"
            return f"Under {name}, {metric} with the prompt shows no clear change: {change}."
        case sign:
            verb = "rises" if sign > 0 else "falls"
            change = f"{abs(gain['difference']):.3f} ({_interval(gain, sign)})"
            return f"Under {name}, {metric} with the prompt {verb} by {change}."


def _contrast_sentence(name: str, metric: str, gain: Figures, control: Figures, factor: float | None) -> str:
    by = "" if factor is None else f" (factor {factor:.2f})"
    if gain["low"] > control["high"]:
        judgement = f"clearly less than {name}"
    elif gain["high"] < control["low"]:
        judgement = f"clearly more than {name}"
    else:
        judgement = f"an interval that overlaps that of {name}"
        judgement += ": contrast may explain the gain" if direction(gain) > 0 else ""
    return f"Contrast alone{by} moves {metric} by {control['difference']:+z.3f} ({_interval(control)}), {judgement}."


def _interval(figures: Figures, sign: int | None = None) -> str:
    """`sign` turns a one-sided interval into amounts: a fall by .2 to .3."""
    if sign is None:
        return f"{INTERVAL} {figures['low']:+z.3f} to {figures['high']:+z.3f}"
    low, high = sorted((sign * figures["low"], sign * figures["high"]))
    return f"{INTERVAL} {low:.3f} to {high:.3f}"


def headline(results: Results) -> dict[str, dict[str, float]]:
    """The numbers of the verdict, at the deciding sampler: what experiments are compared by."""
    table: dict[str, dict[str, float]] = {}
    for column in results.columns[1:]:
        row = table.setdefault(column, {})
        for metric in results.main:
            gain = results.gain(results.etas[0], column, metric)
            if gain is not None:
                row |= {f"{metric}_gain": gain["difference"], f"{metric}_low": gain["low"]}
                row |= {f"{metric}_high": gain["high"], f"{metric}_win_rate": gain["win_rate"]}
    return table


def summary(results: Results, seconds: Mapping[str, float], *, lines: int = 10) -> str:
    """At most `lines` lines for a terminal: the verdict, base and methods with intervals, and how long it took."""
    width = max(len(column) for column in results.columns)
    heads = "  ".join(f"{metric:<24}" for metric in results.main)
    table = [f"{'':{width}}  {heads}".rstrip()]
    for column in results.columns:
        cells = [_cell(results.score(results.etas[0], column, metric)) for metric in results.main]
        table.append(f"{column:{width}}  {'  '.join(cells)}".rstrip())
    took = ["took " + ", ".join(f"{stage} {duration(value)}" for stage, value in seconds.items())] if seconds else []
    first, *others = verdicts(results).values()
    said = [first[0], *(sentences[0] for sentences in others), *first[1:]]
    room = max(1, lines - len(table) - len(took))
    return "\n".join([*said[:room], *table, *took][:lines]) + "\n"


def _cell(score: Figures | None) -> str:
    return f"{'-':<24}" if score is None else f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]".ljust(24)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
