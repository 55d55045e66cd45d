"""Tell what came of a run: one page that needs nothing else, a few lines for the terminal, and the headline numbers.

Reads what prepare, train_preference, align and evaluate left under runs/<profile>/ and writes
report/report.html, report/summary.txt and report/metrics.json beside them.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spo.config import Config
from spo.environment import environment
from spo.files import write_json, write_text
from spo.stages.report_charts import Chart, all_charts
from spo.stages.report_gallery import Card, gallery
from spo.stages.report_inputs import Inputs, read_inputs
from spo.stages.report_results import BASE, Results, direction, duration, headline, summary, verdicts
from spo.tracking import Tracker


def run(config: Config, *, root: Path, tracker: Tracker) -> None:
    """Write the report of the profile's runs; DataError where a stage has not left what it needs."""
    inputs = read_inputs(config, root)
    prompts = {row["prompt_index"] for row in inputs.scores}
    evaluate, columns = config.evaluate, (BASE, *config.methods)
    results = Results(
        inputs.evaluation, config.methods, evaluate.etas, len(prompts), evaluate.primary, evaluate.guarded
    )
    cards = gallery(inputs.images, inputs.scores, columns, eta=evaluate.etas[0], metric=evaluate.primary)
    charts = all_charts(results, inputs)
    numbers = headline(results)
    folder = root / config.folder("report")
    write_text(folder / "report.html", page(config, inputs, results, charts, cards, facts=environment(root)))
    write_text(folder / "summary.txt", summary(results, stage_seconds(inputs)))
    write_json(folder / "metrics.json", numbers)
    tracker.log_metrics(numbers)
    for name in ("report.html", "summary.txt"):
        tracker.log_artifact(folder / name)
    for chart in (chart for section in charts.values() for chart in section):
        tracker.log_text(f"plots/{chart.name}.svg", chart.svg)


def page(
    config: Config,
    inputs: Inputs,
    results: Results,
    charts: Mapping[str, list[Chart]],
    cards: list[Card],
    *,
    facts: Mapping[str, str],
) -> str:
    """The page as HTML; whatever comes from files is escaped."""
    html = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html.filters |= {"signed": signed, "plain": plain, "duration": duration}
    return html.get_template("report_template.html.j2").render(
        profile=config.profile,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        verdicts=verdicts(results),
        results=results,
        direction=direction,
        charts=charts,
        cards=cards,
        training={name: inputs.stages[f"align {name}"] for name in config.methods},
        seconds=stage_seconds(inputs),
        facts=facts,
        settings=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def stage_seconds(inputs: Inputs) -> dict[str, float]:
    """How long each stage took, of those that say so."""
    return {stage: metrics["seconds"] for stage, metrics in inputs.stages.items() if "seconds" in metrics}


def signed(value: float) -> str:
    """+0.012 or a true minus sign, three decimals."""
    return f"{value:+z.3f}".replace("-", "\N{MINUS SIGN}")


def plain(value: Any) -> str:
    """A number as people read it: 12,345 or 0.123."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:z.3f}".replace("-", "\N{MINUS SIGN}")
    return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}") if isinstance(value, int | float) else str(value)
