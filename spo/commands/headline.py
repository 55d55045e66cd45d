"""What a pipeline's run in MLflow shows of its results: figures, verdict, pictures and the report."""

from collections.abc import Mapping
from pathlib import Path

from spo.config import Config
from spo.runtime.files import read_json
from spo.tracking import Tracker
from spo.tracking.run import provenance
from spo.workspace import Workspace


def show_results(config: Config, stage: str, root: Path, tracker: Tracker) -> None:
    """Report what `stage` has just written to the pipeline's run, and each method's figures to a run of its own."""
    workspace = Workspace(config, root)
    if stage == "evaluate":
        _figures(config, workspace.evaluate, tracker, provenance(root))
    elif stage == "report":
        _report(workspace.report, tracker)


def _figures(config: Config, folder: Path, tracker: Tracker, made_by: Mapping[str, str]) -> None:
    """The pipeline's run has the figures of the method that is promoted; the runs of methods have the same names."""
    figures = read_json(folder / "metrics.json")
    for name in ("base", *config.methods):
        facts = {**made_by, "profile": config.profile, "method": name, "stage": "result"}
        facts["mlflow.note.content"] = f"{name} on the test prompts: compare it with the other methods' runs"
        tracker.result(name, facts).log_metrics(figures[name])
    tracker.pipeline.log_metrics(figures[config.promote.method or config.methods[0]])
    tracker.pipeline.log_artifact(folder / "samples.png")


def _report(folder: Path, tracker: Tracker) -> None:
    text = (folder / "summary.txt").read_text(encoding="utf-8").strip()
    tracker.pipeline.set_tags({"verdict": text.partition("\n")[0], "mlflow.note.content": f"```\n{text}\n```"})
    tracker.pipeline.log_metrics(read_json(folder / "metrics.json"))
    for name in ("report.html", "summary.txt"):
        tracker.pipeline.log_artifact(folder / name)
