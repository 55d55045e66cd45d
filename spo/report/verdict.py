"""The verdict in sentences. They follow from the intervals alone."""

from collections.abc import Mapping, Sequence

from spo.report.results import CONTRAST, Figures, Results, direction
from spo.runtime.text import duration

INTERVAL = "95% interval"
DUEL = {1: "is better", -1: "is worse", 0: "is not clearly better or worse"}  # by `direction`


def verdicts(results: Results) -> dict[str, list[str]]:
    """The sentences of each method: against the base, guarded scores, later methods, contrast, other samplers."""
    found = {}
    for name in results.methods:
        sentences = [_gain_sentence(name, results)]
        sentences += [_guard_sentence(name, metric, results.decided(name, metric)) for metric in results.guarded]
        sentences += [_duel_sentence(a, b, results) for a, b in results.duels if a == name]
        if results.gain(results.deciding, name, results.primary, CONTRAST) is not None:
            sentences.append(_contrast_sentence(name, results))
        sentences += [_sampler_sentence(name, sampler, results) for sampler in list(results.samplers)[1:]]
        found[name] = sentences
    return found


def basis(results: Results) -> str:
    """The prompts, sampler and training seeds behind the figures."""
    seeds = results.num_seeds
    trained = (
        "one training seed; another training may give other results than the intervals say"
        if seeds == 1
        else f"{seeds} training seeds; the intervals cover their differences"
    )
    sampler = f"{results.deciding} ({results.samplers[results.deciding]})"
    return f"{results.num_prompts} prompts never trained on, with {sampler} and {trained}."


def summary(results: Results, savings: Sequence[str], seconds: Mapping[str, float], *, lines: int = 10) -> str:
    """At most `lines` lines for a terminal: the verdict, a table with intervals, and the time taken.

    Of the first method's comparisons with others, the last one is told: the baseline is named last.
    """
    width = max(len(column) for column in results.columns)
    heads = "  ".join(f"{metric:<24}" for metric in results.main)
    table = [f"{'':{width}}  {heads}".rstrip()]
    for column in results.columns:
        cells = [_cell(results.score(results.deciding, column, metric)) for metric in results.main]
        table.append(f"{column:{width}}  {'  '.join(cells)}".rstrip())
    took = ["took " + ", ".join(f"{stage} {duration(value)}" for stage, value in seconds.items())] if seconds else []
    first, *others = verdicts(results).values()
    duels = [sentence for sentence in first[1:] if sentence.startswith("Against")]
    rest = [sentence for sentence in first[1:] if sentence not in duels]
    sentences = [first[0], *duels[-1:], *savings[-1:], *rest[:1], *(other[0] for other in others), *rest[1:]]
    room = max(1, lines - len(table) - len(took))
    return "\n".join([*sentences[:room], *table, *took][:lines]) + "\n"


def _gain_sentence(name: str, results: Results) -> str:
    metric = results.primary
    gain = results.decided(name, metric)
    seeds = f" and {results.num_seeds} training seeds" if results.num_seeds > 1 else ""
    where = f"on {results.num_prompts} prompts never trained on{seeds}, winning {_won(gain)}"
    if sign := direction(gain):
        verb = "raises" if sign > 0 else "lowers"
        return f"{name} {verb} {metric} by {abs(gain['difference']):.3f} ({_interval(gain, sign)}) {where}."
    return (
        f"{name} shows no clear change of {metric} over the base: {gain['difference']:+z.3f}, "
        f"and the {_interval(gain)} includes zero, {where}."
    )


def _guard_sentence(name: str, metric: str, gain: Figures) -> str:
    return f"Under {name}, {metric} with the prompt {_change(gain)}."


def _change(gain: Figures) -> str:
    if sign := direction(gain):
        verb = "rises" if sign > 0 else "falls"
        return f"{verb} by {abs(gain['difference']):.3f} ({_interval(gain, sign)})"
    return f"shows no clear change: {gain['difference']:+z.3f} ({_interval(gain)}, includes zero)"


def _sampler_sentence(name: str, sampler: str, results: Results) -> str:
    """A method's changes of all main scores with one of the other samplers, and against later methods."""
    gains = [(metric, gain) for metric in results.main if (gain := results.gain(sampler, name, metric)) is not None]
    parts = [f"{metric} {_change(gain)}" for metric, gain in gains]
    for one, other in results.duels:
        if one == name and (gain := results.gain(sampler, name, results.primary, other)) is not None:
            parts.append(f"against {other} {results.primary} {DUEL[direction(gain)]}: {_signed(gain)}")
    return f"With {sampler}: {'; '.join(parts)}."


def _duel_sentence(name: str, other: str, results: Results) -> str:
    gain = results.decided(name, results.primary, other)
    found = DUEL[direction(gain)]
    change = f"{gain['difference']:+z.3f} in {results.primary} ({_interval(gain)})"
    sentence = f"Against {other}, {name} {found}: {change}, winning {_won(gain)}"
    for metric in results.guarded:
        guard = results.gain(results.deciding, name, metric, other)
        if guard is not None and (sign := direction(guard)):
            verb = "higher" if sign > 0 else "lower"
            sentence += f"; its {metric} is {verb} by {abs(guard['difference']):.3f} ({_interval(guard, sign)})"
    return f"{sentence}."


def _signed(gain: Figures) -> str:
    return f"{gain['difference']:+z.3f} ({_interval(gain)})"


def _contrast_sentence(name: str, results: Results) -> str:
    gain = results.decided(name, results.primary, CONTRAST)
    control = results.decided(CONTRAST, results.primary)
    by = "" if results.contrast_factor is None else f" (factor {results.contrast_factor:.2f})"
    comparison = {
        1: f"clearly less than {name}",
        -1: f"clearly more than {name}",
        0: f"not clearly less than {name}",
    }[direction(gain)]
    if direction(gain) == 0 and direction(results.decided(name, results.primary)) > 0:
        comparison += ": contrast may explain the gain"
    moved = f"{results.primary} by {control['difference']:+z.3f} ({_interval(control)})"
    return f"Contrast alone{by} moves {moved}, {comparison}."


def _won(gain: Figures) -> str:
    low, high = f"{gain['win_rate_low']:.0%}", f"{gain['win_rate_high']:.0%}"
    return f"{gain['win_rate']:.0%} of pairs ({low} to {high})"


def _interval(figures: Figures, sign: int | None = None) -> str:
    """With a sign, the interval of the amount: a fall by .2 to .3."""
    if sign is None:
        return f"{INTERVAL} {figures['low']:+z.3f} to {figures['high']:+z.3f}"
    low, high = sorted((sign * figures["low"], sign * figures["high"]))
    return f"{INTERVAL} {low:.3f} to {high:.3f}"


def _cell(score: Figures | None) -> str:
    return f"{'-':<24}" if score is None else f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]".ljust(24)
