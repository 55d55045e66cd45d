"""The figures of docs/experiments.md, from the tables in docs/experiments: `python -m bench.figures`."""

import csv
import sys
from pathlib import Path

from spo.evaluation.plots import Line, Span, interval_chart, line_chart
from spo.files import write_text

FOLDER = Path("docs/experiments")
METHODS = ("spo", "diffusion_dpo")


def read(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def share_sweep(score: str) -> str:
    """Both methods' gains over the base by the share of finish in the labels, with intervals; * with the full judge."""
    spans = [
        Span(f"{row['method']}, {row['share']}{'*' if row['preference_steps'] == '2700' else ''}",
             float(row["difference"]), float(row["low"]), float(row["high"]), METHODS.index(row["method"]))
        for row in read("share_sweep")
        if row["against"] == "base" and row["score"] == score
    ]  # fmt: skip
    return interval_chart(f"share-{score}", spans, x_label=f"{score}: gain over the base")


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
    drawn = {"share_sweep": share_sweep("aesthetic"), "share_sweep_alignment": share_sweep("alignment")}
    for name, svg in {**drawn, "dpo_curve": dpo_curve()}.items():
        write_text(FOLDER / f"{name}.svg", svg)
        print(FOLDER / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
