"""Report a run: one self-contained page, a short summary for the terminal, and the time that it took.

Reads the outputs of prepare, train_preference, align and evaluate under runs/<profile>/, and the studies in
data/studies/ if there are any; writes report/report.html, report/summary.txt and report/metrics.json beside them.
"""

from pathlib import Path

from spo.config import Config
from spo.errors import DataError
from spo.report.charts import all_charts
from spo.report.cost import duels, leading, numbers
from spo.report.gallery import LARGEST_SHEET, gallery, picture
from spo.report.inputs import Inputs, read_inputs, total_cost
from spo.report.page import page
from spo.report.results import CONTRAST, Results
from spo.report.studies import read_studies
from spo.report.verdict import summary
from spo.runtime.environment import environment
from spo.runtime.files import write_json, write_text
from spo.tracking import Tracker
from spo.workspace import Workspace


def run(config: Config, *, root: Path, tracker: Tracker) -> None:
    """Write the report of the profile's runs; DataError if a stage's output is missing."""
    inputs = read_inputs(config, root)
    results = results_of(config, inputs)
    evaluate, shown = config.evaluate, [column for column in results.columns if column != CONTRAST]
    cards = gallery(inputs.images, inputs.scores, shown, sampler=evaluate.deciding, metric=evaluate.primary)
    for sampler, folder in inputs.other_samplers.items():
        own = [row for row in inputs.scores if (folder / shown[0] / f"{row['prompt_index']:04.0f}-0.png").exists()]
        cards += gallery(folder, own, shown, sampler=sampler, metric=evaluate.primary)
    charts = all_charts(results, inputs)
    costs = duels(
        results,
        inputs.validation,
        inputs.validation_scores,
        tolerance=evaluate.guard_tolerance,
        preference_cost={
            name: total_cost(inputs.preference_models[scorer].cost for scorer in scorers)
            for name in config.methods
            if (scorers := config.align[name].scorers)
        },
    )
    measured = {"pipeline_seconds": round(sum(inputs.seconds.values()), 1), **numbers(costs)}
    folder = Workspace(config, root).report
    studies = read_studies(config, root)
    facts = {**environment(root), "MLflow": tracker.address}
    sheet = picture(inputs.samples, "samples", largest=LARGEST_SHEET)
    html = page(config, inputs, results, charts, sheet, cards, costs, studies, facts=facts)
    write_text(folder / "report.html", html)
    savings = [cost.sentence for cost in leading(costs) if cost.method == results.methods[0]]
    write_text(folder / "summary.txt", summary(results, savings, inputs.seconds))
    write_json(folder / "metrics.json", measured)
    tracker.log_metrics(measured)
    for name in ("report.html", "summary.txt"):
        tracker.log_artifact(folder / name)
    for chart in (chart for section in charts.values() for chart in section):
        tracker.log_text(f"plots/{chart.name}.svg", chart.svg)


def results_of(config: Config, inputs: Inputs) -> Results:
    """The evaluation's tables with the settings of the profile; DataError if the deciding sampler has changed."""
    evaluate = config.evaluate
    if (decided := inputs.evaluation.get("sampler")) != evaluate.deciding:
        raise DataError(
            f"evaluate chose checkpoints with {decided}, but the first of evaluate.samplers is {evaluate.deciding}; "
            "run `python -m spo evaluate` again"
        )
    return Results(
        inputs.means,
        inputs.comparisons,
        config.methods,
        {name: sampler.description for name, sampler in evaluate.samplers.items()},
        num_prompts=len({row["prompt_index"] for row in inputs.scores}),
        num_seeds=len(config.training_seeds),
        primary=evaluate.primary,
        guarded=evaluate.guarded,
        contrast_factor=inputs.evaluation.get(CONTRAST, {}).get("factor"),
    )
