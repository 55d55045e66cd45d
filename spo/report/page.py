"""The report as one self-contained HTML page."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spo.config import Config
from spo.report.charts import Chart
from spo.report.cost import Duel, leading
from spo.report.gallery import Card, Picture
from spo.report.inputs import Inputs, PreferenceModel
from spo.report.results import Results, direction, level
from spo.report.studies import Study
from spo.report.verdict import basis, verdicts
from spo.runtime.text import duration
from spo.workspace import Workspace


def page(
    config: Config,
    inputs: Inputs,
    results: Results,
    charts: Mapping[str, list[Chart]],
    sheet: Picture,
    cards: list[Card],
    costs: Sequence[Duel],
    studies: Sequence[Study],
    *,
    facts: Mapping[str, str],
) -> str:
    """The page as HTML; values from files are escaped."""
    html = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html.filters |= {"signed": signed, "plain": plain, "duration": duration, "percent": "{:.0%}".format, "minus": minus}
    scorers = {name: ", ".join(section.scorers) for name, section in config.align.items()}
    left_out = [s for metric in config.evaluate.metrics for s in metric.scores if s not in results.metrics]
    return html.get_template("template.html.j2").render(
        profile=config.profile,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        verdicts=verdicts(results),
        basis=basis(results),
        results=results,
        direction=direction,
        level=level,
        left_out=left_out,
        charts=charts,
        sheet=sheet,
        cards=cards,
        costs=costs,
        leading=leading(costs),
        studies=studies,
        chosen=[
            f"{row['column']} seed {row['training_seed']:.0f}: {row['checkpoint']}"
            for row in inputs.validation
            if row.get("chosen") == 1
        ],
        training=[
            {
                "method": name,
                "seed": seed,
                "scorer": scorers[name],
                **metrics,
                **per_pair(metrics),
            }
            for name, runs in inputs.training.items()
            for seed, metrics in zip(config.training_seeds, runs, strict=True)
        ],
        preference_models=[
            {"name": name, "kind": config.preference_models[name].kind, **model.metrics, **mean_agreement(model)}
            for name, model in inputs.preference_models.items()
        ],
        seconds=inputs.seconds,
        facts=facts,
        folder=Workspace(config).evaluate.as_posix(),
        settings=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def per_pair(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A training's UNet forwards and seconds for each example that it kept."""
    count = metrics.get("num_examples")
    names = [name for name in ("unet_forwards", "seconds") if count and name in metrics]
    return {f"{name}_per_pair": metrics[name] / count for name in names}


def mean_agreement(model: PreferenceModel) -> dict[str, float]:
    """The trained model's agreement with labels and on candidates, means over the measured timesteps."""
    found: dict[str, float] = {}
    if trained := [row["accuracy"] for row in model.accuracy if row["model"] == model.accuracy[-1]["model"]]:
        found["agreement_labels"] = fmean(trained)
    if model.candidates:
        found["agreement_candidates"] = fmean(row["agreement"] for row in model.candidates)
    return found


def signed(value: float) -> str:
    """+0.012 or a true minus sign, three decimals."""
    return f"{value:+z.3f}".replace("-", "\N{MINUS SIGN}")


def plain(value: Any) -> str:
    """A number as people read it: 12,345 or 0.123."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:z.3f}".replace("-", "\N{MINUS SIGN}")
    return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}") if isinstance(value, int | float) else str(value)


def minus(text: str) -> str:
    """Text with true minus signs before its numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)
