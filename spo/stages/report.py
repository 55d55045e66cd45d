"""Tell what came of a run: one page that needs nothing else, a few lines for the terminal, and how long it all took.

Reads what prepare, train_preference, align and evaluate left under runs/<profile>/ and writes
report/report.html, report/summary.txt and report/metrics.json beside them.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spo.config import Config, SampledConfig
from spo.environment import environment
from spo.files import write_json, write_text
from spo.stages.report_charts import Chart, all_charts
from spo.stages.report_cost import Duel, duels, leading, numbers, sentences
from spo.stages.report_gallery import Card, gallery
from spo.stages.report_inputs import Inputs, read_inputs
from spo.stages.report_results import CONTRAST, Results, direction, level
from spo.stages.report_verdict import basis, duration, summary, verdicts
from spo.tracking import Tracker


def run(config: Config, *, root: Path, tracker: Tracker) -> None:
    """Write the report of the profile's runs; DataError where a stage has not left what it needs."""
    inputs = read_inputs(config, root)
    results = results_of(config, inputs)
    evaluate, shown = config.evaluate, [column for column in results.columns if column != CONTRAST]
    cards = gallery(inputs.images, inputs.scores, shown, eta=evaluate.etas[0], metric=evaluate.primary)
    charts = all_charts(results, inputs)
    costs = duels(
        results,
        inputs.validation,
        inputs.validation_scores,
        tolerance=evaluate.guard_tolerance,
        judge=inputs.judge,
        judged=[name for name in config.methods if isinstance(config.align[name], SampledConfig)],
    )
    measured = {"pipeline_seconds": round(sum(inputs.seconds.values()), 1), **numbers(costs)}
    folder = root / config.folder("report")
    html = page(config, inputs, results, charts, cards, costs, facts=environment(root))
    write_text(folder / "report.html", html)
    write_text(folder / "summary.txt", summary(results, sentences(costs), inputs.seconds))
    write_json(folder / "metrics.json", measured)
    tracker.log_metrics(measured)
    for name in ("report.html", "summary.txt"):
        tracker.log_artifact(folder / name)
    for chart in (chart for section in charts.values() for chart in section):
        tracker.log_text(f"plots/{chart.name}.svg", chart.svg)


def results_of(config: Config, inputs: Inputs) -> Results:
    """The evaluation's tables, as the profile asks about them."""
    evaluate = config.evaluate
    return Results(
        inputs.means,
        inputs.comparisons,
        config.methods,
        evaluate.etas,
        num_prompts=len({row["prompt_index"] for row in inputs.scores}),
        num_seeds=len(config.training_seeds),
        primary=evaluate.primary,
        guarded=evaluate.guarded,
        contrast_factor=inputs.evaluation.get(CONTRAST, {}).get("factor"),
    )


def page(
    config: Config,
    inputs: Inputs,
    results: Results,
    charts: Mapping[str, list[Chart]],
    cards: list[Card],
    costs: Sequence[Duel],
    *,
    facts: Mapping[str, str],
) -> str:
    """The page as HTML; whatever comes from files is escaped."""
    html = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html.filters |= {"signed": signed, "plain": plain, "duration": duration, "percent": percent, "minus": minus}
    left_out = [s for metric in config.evaluate.metrics for s in metric.scores if s not in results.metrics]
    return html.get_template("report_template.html.j2").render(
        profile=config.profile,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        verdicts=verdicts(results),
        basis=basis(results),
        results=results,
        direction=direction,
        level=level,
        left_out=left_out,
        charts=charts,
        cards=cards,
        costs=costs,
        leading=leading(costs),
        chosen=_chosen(inputs),
        training=_training(config, inputs),
        seconds=inputs.seconds,
        facts=facts,
        folder=config.folder("evaluate").as_posix(),
        settings=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def signed(value: float) -> str:
    """+0.012 or a true minus sign, three decimals."""
    return f"{value:+z.3f}".replace("-", "\N{MINUS SIGN}")


def plain(value: Any) -> str:
    """A number as people read it: 12,345 or 0.123."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:z.3f}".replace("-", "\N{MINUS SIGN}")
    return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}") if isinstance(value, int | float) else str(value)


def minus(text: str) -> str:
    """Words with true minus signs before their numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)


def percent(value: float) -> str:
    return f"{value:.0%}"


def _training(config: Config, inputs: Inputs) -> list[dict[str, Any]]:
    """What each training took, a row each."""
    return [
        {"method": name, "seed": seed, **metrics}
        for name, runs in inputs.training.items()
        for seed, metrics in zip(config.training_seeds, runs, strict=True)
    ]


def _chosen(inputs: Inputs) -> list[str]:
    """The checkpoint of each training that the figures are of."""
    return [
        f"{row['column']} seed {row['training_seed']:.0f}: {row['checkpoint']}"
        for row in inputs.validation
        if row.get("chosen") == 1
    ]
