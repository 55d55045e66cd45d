"""The figures of docs/experiments.md, from the tables in docs/experiments: `python -m experiments.figures`."""

import csv
import sys
from pathlib import Path

from spo.report.plots import Line, Span, interval_chart, line_chart
from spo.runtime.files import write_text

FOLDER = Path("docs/experiments")
FULL = "2700"  # preference_steps of a preference model that learns as long as the shipped one


def read(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def series(row: dict[str, str]) -> str:
    """Which of the sweep's series a row belongs to."""
    if row["method"] == "diffusion_dpo":
        return "DPO mixed" if row["pairs"] == "prepared" else "DPO one"
    return "SPO" if row["preference_steps"] == FULL else "SPO short"


SERIES = ("SPO", "SPO short", "DPO mixed", "DPO one")  # of the preference model, and of the pairs' checkpoints


def sweep(name: str, score: str, *, over: str, share: str | None = None, temperature: str | None = None) -> str:
    """Gains over the base against the column `over`, a row a cell, with intervals."""
    rows = [
        row
        for row in read("share_sweep")
        if row["against"] == "base"
        and row["score"] == score
        and share in (None, row["share"])
        and temperature in (None, row["temperature"])
    ]
    rows.sort(key=lambda row: (float(row[over]), SERIES.index(series(row))))
    spans = [
        Span(f"{row[over]} {series(row)}", *(float(row[key]) for key in ("difference", "low", "high")),
             SERIES.index(series(row)))
        for row in rows
    ]  # fmt: skip
    return interval_chart(name, spans, x_label=f"{score}: gain by {over}")


def methods(name: str) -> str:
    """Each method's gain over the base on the test prompts, at its best trial, from the table `name`."""
    rows = [row for row in read(name) if row["against"] == "base"]
    spans = [
        Span(row["method"], *(float(row[f"aesthetic_{key}"]) for key in ("difference", "low", "high")), 0)
        for row in rows
    ]
    return interval_chart(name, spans, x_label="aesthetic: gain over the base")


def dpo_curve() -> str:
    """Gain on validation prompts against UNet forwards: Diffusion-DPO by its learning rate, and SPO."""
    runs: dict[str, list[dict[str, str]]] = {}
    for row in read("dpo_curve"):
        name = f"{float(row['learning_rate']):g}" if row["method"] == "diffusion_dpo" else row["method"]
        runs.setdefault(name, []).append(row)
    lines = [
        Line(name, [float(row["unet_forwards"]) for row in rows], [float(row["aesthetic_difference"]) for row in rows],
             markers=True, slot=slot)
        for slot, (name, rows) in enumerate(runs.items())
    ]  # fmt: skip
    return line_chart("dpo-curve", lines, x_label="UNet forwards", y_label="aesthetic: gain over the base")


def main() -> int:
    drawn = {
        "share_sweep": sweep("share", "aesthetic", over="share", temperature="0.3"),
        "share_sweep_alignment": sweep("share-alignment", "alignment", over="share", temperature="0.3"),
        "noise_sweep": sweep("noise", "aesthetic", over="temperature", share="0.25"),
        "methods": methods("methods"),
        "ablations": methods("ablations"),
        "dpo_curve": dpo_curve(),
    }
    for name, svg in drawn.items():
        write_text(FOLDER / f"{name}.svg", svg)
        print(FOLDER / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
