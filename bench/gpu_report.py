"""The figures of `bench.gpu` as Markdown, and into docs/performance.md."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.markdown import table
from spo.errors import DataError

BEGIN, END = "<!-- bench.gpu: begin -->", "<!-- bench.gpu: end -->"
Figures = Mapping[str, Any]


def markdown(results: Figures) -> str:
    """All rows that were measured, as tables, and of the others what became of them."""
    rows = {row["name"]: row["figures"] for row in results["rows"] if row["figures"]}
    sections = [_head(results), *(text for write in SECTIONS if (text := write(rows)))]
    others = [f"- {row['name']}: {row['status']}" for row in results["rows"] if row["status"] != "measured"]
    if others:
        sections.append("\n".join(["Not measured, or not whole:", "", *others]))
    return "\n\n".join(sections)


def write_docs(files: Sequence[Path], docs: Path) -> None:
    """Put the figures of a GPU between the marks in `docs`; DataError where there are none, or no marks.

    files: of runs on one kind of machine; where several have a row, the last whole one counts
    """
    text = markdown(_together([_read(file) for file in files]))
    whole = docs.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{docs} lacks the marks {BEGIN} and {END}, between which the figures go")
    docs.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _read(file: Path) -> Figures:
    """The results in a file; DataError unless they are of a GPU."""
    try:
        results: Figures = json.loads(file.read_text(encoding="utf-8"))
        markdown(results)
        device = results["device"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is no result of bench.gpu: {type(error).__name__}: {error}") from None
    if device != "cuda":
        raise DataError(f"{file} is of {results['machine']}; the documentation takes a GPU's figures alone")
    return results


def _together(runs: Sequence[Figures]) -> Figures:
    """The rows of all runs under one head; DataError if they are of different machines or torches."""
    machines = {f"{run['machine']} with torch {run['torch']}" for run in runs}
    if len(machines) > 1:
        raise DataError(f"--write-docs got results of {' and '.join(sorted(machines))}; give those of one of them")
    rows: dict[str, Any] = {}
    for row in (row for run in runs for row in run["rows"]):
        if row["name"] not in rows or row["status"] == "measured":
            rows[row["name"]] = row
    commits = " and ".join(dict.fromkeys(run["commit"] for run in runs if run.get("commit")))
    times = sorted(run["started"] for run in runs)
    started = times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}"
    return {**runs[0], "commit": commits, "started": started, "rows": list(rows.values())}


def _head(results: Figures) -> str:
    versions = f"torch {results['torch']}" + (f", CUDA {results['cuda']}" if results.get("cuda") else "")
    commit = f", commit {results['commit']}" if results.get("commit") else ""
    size = "full size" if results["size"] == "full" else f"{results['size']} shapes"
    text = f"**{results['machine']}**, {versions}, Python {results['python']}{commit}, {results['started']}: {size}, "
    return text + "random weights."


def _rates(rows: Mapping[str, Figures]) -> str:
    found = rows.get("rates", {})
    if "seconds_a_small_operation" not in found:
        return ""
    return (
        f"A large product ({found['product_dtype']}): {found['product_flops_a_second'] / 1e12:.3g} TFLOP/s. "
        f"A large copy, read and written: {found['copy_bytes_a_second'] / 1e12:.3g} TB/s. "
        f"One operation on eight numbers: {1e6 * found['seconds_a_small_operation']:.3g} us."
    )


def _duels(rows: Mapping[str, Figures]) -> str:
    parts = []
    for name in [name for name in rows if name.startswith("spo-") and "ours" in rows[name]]:
        found = rows[name]
        plain, ours = found["plain"], found["ours"]
        lines = [["", "published way", "ours", "ratio"]]
        for label, key, unit in (("s a batch", "seconds", 1), ("s a kept pair", "seconds_a_pair", 1)):
            faster = f"{found['times_faster']:.2f} times faster"
            lines.append([label, number(plain[key] / unit), number(ours[key] / unit), faster])
        for label, key in (("peak memory, GB", "peak_bytes"), ("above the shared weights, GB", "above_shared_bytes")):
            if plain[key] and ours[key]:
                lines.append([label, giga(plain[key]), giga(ours[key]), f"{ours[key] / plain[key]:.2f} of it"])
        lines.append(["share of the floor", *(f"{way['share_of_floor']:.1%}" for way in (plain, ours)), ""])
        parts.append(
            f"{name}: {_batch(found)}; {found['pairs']} pairs, updates of {found['batch_size']}; runs in turns: "
            f"{len(found['runs']['ours'])} each{_note(found)}.\n\n{table(lines)}\n\n"
            f"Identical pairs: {found['identical_pairs']:.1%}; largest difference of an update's loss: "
            f"{found['largest_loss_difference']:.1e}."
        )
    return "\n\n".join(parts)


def _where(rows: Mapping[str, Figures]) -> str:
    names = [name for name in rows if name.startswith("where-") and "groups" in rows[name]]
    if not names:
        return ""
    lines = [["", *(cell for name in names for cell in (f"{name}, s", "share"))]]
    for part in rows[names[0]]["groups"]:
        cells = [(rows[name]["groups"][part], rows[name]["seconds"]) for name in names]
        lines.append([part, *(cell for value, whole in cells for cell in (number(value), f"{value / whole:.1%}"))])
    lines.append(["all", *(cell for name in names for cell in (number(rows[name]["seconds"]), "100%"))])
    lines.append(["a kept pair", *(cell for name in names for cell in (number(rows[name]["seconds_a_pair"]), ""))])
    floors = [(rows[name].get("floor_seconds"), rows[name].get("share_of_floor")) for name in names]
    lines.append(["the floor", *(cell for floor, share in floors for cell in (number(floor), percent(share)))])
    peaks = [rows[name]["peak_bytes"] for name in names]
    if all(peaks):
        lines.append(["peak memory, GB", *(cell for peak in peaks for cell in (giga(peak), ""))])
    return f"Where the time of our batch goes ({'; '.join(_batch(rows[name]) for name in names)}):\n\n{table(lines)}"


def _compiled(rows: Mapping[str, Figures]) -> str:
    parts = []
    for name in [name for name in rows if name.startswith("compiled-") and "runs" in rows[name]]:
        runs = rows[name]["runs"]
        lines = [["", "s a batch", "times faster", "peak memory, GB"]]
        for label, run in runs.items():
            faster = f"{runs['as it is']['seconds'] / run['seconds']:.2f}"
            lines.append([label, number(run["seconds"]), faster, giga(run["peak_bytes"])])
        text = f"{name}, our batch with model.compile: {_batch(rows[name])}.\n\n{table(lines)}"
        if (difference := rows[name].get("largest_loss_difference")) is not None:
            text += f"\n\nLargest difference of an update's loss: {difference:.1e}."
        parts.append(text)
    return "\n\n".join(parts)


def _preference(rows: Mapping[str, Figures]) -> str:
    found = [rows[name] for name in rows if name.startswith("preference-") and "seconds" in rows[name]]
    if not found:
        return ""
    lines = [["pairs a step", "s a step", "s a pair", "peak memory, GB", "share of the floor"]]
    for row in found:
        share = f"{row['share_of_floor']:.1%}" if "share_of_floor" in row else ""
        cells = [number(row["seconds"]), number(row["seconds_a_pair"]), giga(row["peak_bytes"])]
        lines.append([str(row["pairs"]), *cells, share])
    return f"One step of train_preference ({found[0]['dtype']}):\n\n{table(lines)}"


def _kinds(rows: Mapping[str, Figures]) -> str:
    parts = []
    for name in [name for name in rows if name.startswith("kinds-") and "times_faster" in rows[name]]:
        pixel, latent = rows[name]["kinds"]["pixel"], rows[name]["kinds"]["latent"]
        lines = [["", "pixel", "latent", "latent of pixel"]]
        for label, key in (
            ("s a kept pair", "seconds_a_pair"),
            ("UNet forwards a kept pair", "forwards_a_pair"),
            ("decoded images a kept pair", "decodes_a_pair"),
        ):
            lines.append([label, number(pixel[key]), number(latent[key]), f"{latent[key] / pixel[key]:.2f}"])
        if pixel["peak_bytes"] and latent["peak_bytes"]:
            ratio = f"{latent['peak_bytes'] / pixel['peak_bytes']:.2f}"
            lines.append(["peak memory, GB", giga(pixel["peak_bytes"]), giga(latent["peak_bytes"]), ratio])
        parts.append(f"{name}, the kinds of preference model: {_batch(rows[name])}.\n\n{table(lines)}")
    return "\n\n".join(parts)


def _busy(rows: Mapping[str, Figures]) -> str:
    found = rows.get("busy", {}).get("parts", {})
    if not found:
        return ""
    lines = [["part", "ms", "ms of kernels", "share", "kernels", "us a kernel", "most of the time"]]
    for name, part in found.items():
        own, most = part["kernel_seconds"], part["top"][0]
        share = f"{own / part['seconds']:.0%}"
        cells = [number(1e3 * part["seconds"]), number(1e3 * own), share, str(part["kernels"])]
        cells.append(number(1e6 * own / part["kernels"]))
        lines.append([name, *cells, f"{most[0].replace('|', '/')[:60]}: {most[1] / own:.0%}"])
    return f"How long the GPU computes, on SD v1.5's shape (parts as in `bench/gpu_switches.py`):\n\n{table(lines)}"


def _switches(rows: Mapping[str, Figures]) -> str:
    lines = [["switch", "what is timed", "ms", "times faster", "peak memory, GB", "first call, s"]]
    for name in [name for name in rows if name.startswith("switch-")]:
        for label, trial in rows[name].get("trials", {}).items():
            if "failed" in trial:
                cells = [trial["failed"].replace("|", "/"), "", "", ""]
            else:
                faster = "" if label.endswith(", again") else f"{trial['times_faster']:.2f}"
                peak = giga(trial["peak_bytes"])
                cells = [number(1e3 * trial["seconds"]), faster, peak, number(trial["first_call_seconds"])]
            lines.append([name.removeprefix("switch-"), label, *cells])
    return f"Switches, one by one, on SD v1.5's shape (`bench/gpu_switches.py`):\n\n{table(lines)}" if lines[1:] else ""


def _check(rows: Mapping[str, Figures]) -> str:
    found = rows.get("check", {})
    if "estimate_over_measured" not in found:
        return ""
    lines = [
        ["", "check's estimate", "measured", "ratio"],
        [
            "s a batch",
            number(found["estimated_seconds"]),
            number(found["measured_seconds"]),
            f"{found['estimate_over_measured']:.2f}",
        ],
    ]
    if found["estimated_bytes"] and found["measured_bytes"]:
        ratio = f"{found['estimated_bytes'] / found['measured_bytes']:.2f}"
        lines.append(["memory, GB", giga(found["estimated_bytes"]), giga(found["measured_bytes"]), ratio])
    return f"What `check` would have said of SD v1.5's batch ({_batch(found)}):\n\n{table(lines)}"


SECTIONS: tuple[Callable[[Mapping[str, Figures]], str], ...] = (
    _rates,
    _duels,
    _where,
    _kinds,
    _compiled,
    _preference,
    _busy,
    _switches,
    _check,
)


def _batch(found: Figures) -> str:
    segments = "" if found["branch_steps"] == 1 else f", segments of {found['branch_steps']}"
    what = f"{found['shape']}, {found['resolution']} px, {found['prompts']} prompts, k = {found['candidates']}"
    return f"{what}, {found['steps']} steps{segments}"


def _note(found: Figures) -> str:
    return f"; {found['note']}" if "note" in found else ""


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def giga(num_bytes: float | None) -> str:
    """Bytes as GB; nothing for what was not measured."""
    return "" if num_bytes is None else f"{num_bytes / 1e9:.3g}"
