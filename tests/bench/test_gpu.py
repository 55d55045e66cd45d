"""bench.gpu runs every row on a bare machine, and nothing that goes wrong in one costs another."""

import ast
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from bench import gpu, gpu_run, gpu_spo, gpu_switches
from bench.gpu_bench import Bench
from bench.gpu_report import BEGIN, END, markdown, write_docs
from bench.gpu_rows import ROWS, Row, chosen
from bench.gpu_run import TIME_OVER, Deadline, Results
from bench.gpu_spo import CHECKED_PAIRS, CHECKED_PROMPTS
from bench.plain import PlainPath
from bench.systems import make_system
from spo.commands import miniature as check
from spo.errors import DataError

ROOT = Path(__file__).parents[2]
HEAD = {"device": "cpu", "machine": "a machine", "size": "small", "torch": "2", "python": "3", "started": "today"}
SMALL = ["--device", "cpu", "--size", "small"]


def distributions(names: Sequence[str]) -> set[str]:
    """These installed distributions and all that they need, by name."""
    found: set[str] = set()
    wanted = list(names)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if not needed.marker or needed.marker.evaluate({"extra": ""}):
                wanted.append(needed.name)
    return found


def listed_wheels() -> list[str]:
    """The packages that bench.gpu's docstring has collected."""
    command = (gpu.__doc__ or "").partition("--dest wheels")[2].partition("\n\n")[0]
    return command.replace("\\", " ").split()


@pytest.fixture(scope="module")
def bare_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: torch and numpy with what torch needs, and the listed wheels; nothing else is there."""
    site = tmp_path_factory.mktemp("site")
    for name in {*distributions(["torch", "numpy"]), *listed_wheels()}:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    return site


def run_bare(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with the packages of `site` alone, and those of the repository."""
    paths = {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        env={**os.environ, **paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        cwd=site.parent,
        capture_output=True,
        text=True,
    )


WHOLE_RUN = """
import sys
from bench.gpu import main
code = main(sys.argv[1:])
unwanted = [name for name in ("mlflow", "prefect", "dvc", "pyarrow", "matplotlib") if name in sys.modules]
print("unwanted:", unwanted)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def whole_run(bare_machine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Every row in small; the process and the folder of its results."""
    out = tmp_path_factory.mktemp("out")
    return run_bare(bare_machine, WHOLE_RUN, *SMALL, "--minutes", "60", "--out", str(out)), out


@pytest.mark.slow
def test_every_row_is_measured_on_a_bare_machine(whole_run: tuple[Any, Path]) -> None:
    done, out = whole_run
    results = json.loads((out / "gpu.json").read_text())
    assert {row["name"]: row["status"] for row in results["rows"]} == {row.name: "measured" for row in ROWS}
    assert done.returncode == 0
    assert "unwanted: []" in done.stdout
    assert "failed" not in (out / "gpu.json").read_text()


@pytest.mark.slow
def test_a_row_holds_what_it_is_for(whole_run: tuple[Any, Path]) -> None:
    _, out = whole_run
    rows = {row["name"]: row["figures"] for row in json.loads((out / "gpu.json").read_text())["rows"]}
    for name in ("spo-sd15", "spo-sdxl"):
        assert rows[name]["identical_pairs"] == 1.0
        assert rows[name]["largest_loss_difference"] < 1e-4
        assert rows[name]["times_faster"] > 0
        assert {"seconds", "seconds_a_pair", "peak_bytes", "share_of_floor"} <= set(rows[name]["ours"])
    for name in ("where-sd15", "where-sdxl", "where-sd35", "where-flux"):
        groups = rows[name]["groups"]
        assert list(groups) == ["network, sampling", "VAE", "preference model", "updates", "rest"]
        assert sum(groups.values()) == pytest.approx(rows[name]["seconds"])
    assert [rows[f"preference-{n}"]["pairs"] for n in (1, 4, 16)] == [1, 4, 16]
    for name in ("kinds-sd15", "kinds-sdxl"):
        pixel, latent = (rows[name]["kinds"][kind] for kind in ("pixel", "latent"))
        assert pixel["pairs"] == latent["pairs"] and pixel["decodes_a_pair"] > 0 == latent["decodes_a_pair"]
    assert {"sample", "update", "decode", "score"} == set(rows["busy"]["parts"])
    assert all(part["kernel_seconds"] > 0 for part in rows["busy"]["parts"].values())
    assert {"sample", "sample, compiled"} == set(rows["switch-compile"]["trials"])
    assert list(rows["compiled-sd15"]["runs"]) == ["as it is", "the first batch, which compiles", "compiled"]
    assert rows["compiled-sd15"]["largest_loss_difference"] < 1e-4
    assert rows["check"]["estimated_seconds"] > 0


@pytest.mark.slow
def test_the_documentation_takes_a_gpus_figures_once(whole_run: tuple[Any, Path], tmp_path: Path) -> None:
    _, out = whole_run
    results = json.loads((out / "gpu.json").read_text())
    docs, file = tmp_path / "performance.md", tmp_path / "gpu.json"
    docs.write_text(f"# Title\n\n{BEGIN}\nNot measured.\n{END}\n\n## After\n")
    with pytest.raises(DataError, match="GPU's figures alone"):
        write_docs([out / "gpu.json"], docs)
    file.write_text(json.dumps({**results, "device": "cuda", "machine": "Some Card"}))
    write_docs([file], docs)
    once = docs.read_text()
    write_docs([file], docs)
    assert docs.read_text() == once
    assert once.startswith(f"# Title\n\n{BEGIN}\n**Some Card**")
    assert once.endswith(f"{END}\n\n## After\n")
    assert "Not measured." not in once
    assert all(text in once for text in ("times faster", "Where the time", "train_preference", "check's estimate"))
    other = tmp_path / "other.json"
    row = {"name": "rates", "status": TIME_OVER, "row_seconds": 0.0, "figures": {}}
    other.write_text(json.dumps({**results, "device": "cuda", "machine": "Some Card", "rows": [row]}))
    write_docs([other, file], docs)  # the whole row counts, wherever it is
    assert TIME_OVER not in docs.read_text()
    later = {"device": "cuda", "machine": "Some Card", "commit": "abc", "started": "tomorrow"}
    other.write_text(json.dumps({**results, **later, "rows": [row]}))
    file.write_text(json.dumps({**results, **later, "commit": "def", "started": "now"}))
    write_docs([file, other], docs)
    assert "commit def and abc, now to tomorrow: small shapes" in docs.read_text()
    other.write_text(json.dumps({**results, "device": "cuda", "machine": "Another Card"}))
    with pytest.raises(DataError, match="of Another Card with torch"):
        write_docs([file, other], docs)


NO_DIFFUSERS = """
import sys
for name in ("mlflow", "prefect", "dvc", "diffusers"):
    sys.modules[name] = None
from bench.gpu import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_missing_package_costs_the_rows_that_need_it(bare_machine: Path, tmp_path: Path) -> None:
    only = ["--only", "rates", "spo-sd15", "preference-1"]
    done = run_bare(bare_machine, NO_DIFFUSERS, *SMALL, *only, "--out", str(tmp_path))
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    missing = "failed: the package diffusers is missing"
    assert [row["status"] for row in rows] == ["measured", missing, missing]
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_without_torch_there_is_one_line(bare_machine: Path, tmp_path: Path) -> None:
    code = NO_DIFFUSERS.replace('"diffusers"', '"torch"')
    done = run_bare(bare_machine, code, *SMALL, "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "error: the package torch is missing; see bench/gpu.py for the wheels\n"


# Rows of their own, in this process: what they do is found by name in this module.


def good(bench: Bench, figures: dict[str, Any]) -> None:
    figures["value"] = float("nan")


def short_of_memory(bench: Bench, figures: dict[str, Any]) -> None:
    figures["before"] = 1
    bench._held = "mini", make_system("mini", "cpu")
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")


def broken(bench: Bench, figures: dict[str, Any]) -> None:
    raise RuntimeError("first line\nsecond line")


def rings(bench: Bench, figures: dict[str, Any]) -> None:
    """What the alarm does, at once."""
    figures["so far"] = 1
    bench.deadline.end = time.monotonic() - 1
    os.kill(os.getpid(), signal.SIGALRM)
    raise AssertionError("the alarm did not ring")


def is_stopped(bench: Bench, figures: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def of(function: Any, *, least: float = 0, call: str | None = None) -> Row:
    return Row(function.__name__, call or f"{function.__module__}:{function.__name__}", least)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, good.__module__, sys.modules.get(good.__module__) or sys.modules[__name__])


def run(rows: Sequence[Row], tmp_path: Path, *, minutes: float = 60) -> tuple[int, list[dict[str, Any]], Bench]:
    bench = Bench("cpu", "small", Deadline(time.monotonic(), minutes))
    results = Results(tmp_path, HEAD)
    with gpu.stoppable():
        code = gpu_run.run_rows(rows, bench, results)
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert (tmp_path / "gpu.md").read_text() == markdown({**HEAD, "rows": found}) + "\n"
    return code, found, bench


@pytest.mark.usefixtures("importable")
def test_running_out_of_memory_costs_one_row(tmp_path: Path) -> None:
    code, found, bench = run([of(good), of(short_of_memory), of(broken), of(good)], tmp_path)
    assert [row["status"] for row in found] == [
        "measured",
        "failed: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. More lines.",
        "failed: RuntimeError: first line second line",
        "measured",
    ]
    assert code == 1
    assert found[1]["figures"] == {"before": 1}
    assert found[3]["figures"] == {"value": None}, "JSON has no nan"
    assert bench._held is None, "what the row had in memory was kept"


@pytest.mark.usefixtures("importable")
def test_a_lost_device_leaves_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access to memory, every call of CUDA in the process fails."""

    def lost(_: Bench) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Bench, "drop", lost)
    code, found, _ = run([of(good), of(broken), of(good)], tmp_path)
    assert [row["status"] for row in found] == [
        "measured",
        "failed: RuntimeError: first line second line; the device is lost to this process",
        "skipped: the device is lost",
    ]
    assert code == 1


def test_a_row_whose_package_is_missing_says_so(tmp_path: Path) -> None:
    code, found, _ = run([of(good, call="no_such_package.at_all:row")], tmp_path)
    assert (code, found[0]["status"]) == (1, "failed: the package no_such_package is missing")


@pytest.mark.usefixtures("importable")
def test_when_the_time_is_over_the_rest_is_skipped_and_all_is_written(tmp_path: Path) -> None:
    code, found, _ = run([of(good), of(rings), of(good), of(broken)], tmp_path)
    assert [row["status"] for row in found] == ["measured", TIME_OVER, TIME_OVER, TIME_OVER]
    assert found[1]["figures"] == {"so far": 1}
    assert code == 0
    assert "skipped: time over" in (tmp_path / "gpu.md").read_text()


@pytest.mark.usefixtures("importable")
def test_a_signal_leaves_what_is_written(tmp_path: Path) -> None:
    code, found, _ = run([of(good), of(is_stopped), of(good)], tmp_path)
    assert [row["status"] for row in found] == ["measured", "stopped", "skipped: stopped"]
    assert code == 128 + signal.SIGTERM


@pytest.mark.usefixtures("importable")
def test_a_row_that_needs_more_than_is_left_is_not_begun(tmp_path: Path) -> None:
    bench = Bench("cpu", "small", Deadline(time.monotonic(), 60))
    bench.full = True  # in small nothing has a least
    assert gpu_run.attempt(of(good, least=4000), bench, {}) == TIME_OVER
    assert gpu_run.attempt(of(good, least=1), bench, {}) == "measured"


def test_a_row_leaves_the_later_ones_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run.time, "monotonic", lambda: 100.0)
    deadline = Deadline(0.0, 10)  # the margin of 3 s taken off, 497 s are left
    deadline.later = 400
    assert deadline.left() == 497
    assert deadline.limit(least=20) == 97
    assert deadline.limit(least=200) == 200
    assert deadline.limit(least=1000) == 497
    assert deadline.spare(97)
    assert not deadline.spare(98)


class ShortOfMemory(PlainPath):
    """The published way on a card that is too small for updates of more than one pair."""

    def update(self, pairs: dict[str, torch.Tensor], index: torch.Tensor) -> float:
        if len(index) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().update(pairs, index)


def test_where_memory_is_short_both_ways_are_measured_with_smaller_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_spo.WAYS, "plain", ShortOfMemory)
    monkeypatch.setattr(gpu_spo, "few", lambda system: replace(system, settings=of_one_pair(system.settings)))
    bench = Bench("cpu", "small", Deadline(time.monotonic(), 60))
    figures: dict[str, Any] = {}
    gpu_spo.duel(bench, figures, family="sd15")
    assert figures["note"] == "out of memory with updates of 3 pairs, so they have 1"
    assert figures["at_first"]["batch_size"] == 3
    assert [len(figures["at_first"]["runs"][way]) for way in ("ours", "plain")] == [1, 0]
    assert figures["batch_size"] == 1
    assert figures["identical_pairs"] == 1.0
    assert "updates of 1" in markdown(
        {**HEAD, "rows": [{"name": "spo-sd15", "status": "measured", "figures": figures}]}
    )


def of_one_pair(settings: Any) -> Any:
    return settings.model_copy(update={"batch_size": 1})


def test_a_switch_that_fails_costs_itself_alone() -> None:
    bench = Bench("cpu", "small", Deadline(time.monotonic(), 60))
    figures: dict[str, Any] = {}

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    gpu_switches.in_turns(bench, figures, [("as it is", list, nullcontext()), ("switched", fail, nullcontext())])
    assert figures["trials"]["switched"] == {"failed": "OutOfMemoryError: CUDA out of memory."}
    assert figures["trials"]["as it is"]["times_faster"] == 1
    text = markdown({**HEAD, "rows": [{"name": "switch-x", "status": "measured", "figures": figures}]})
    assert "| x | switched | OutOfMemoryError: CUDA out of memory. |" in text


def test_only_takes_rows_by_name_or_by_beginning() -> None:
    assert [row.name for row in chosen(["check", "preference"])] == [*(f"preference-{n}" for n in (1, 4, 16)), "check"]
    assert chosen(None) == list(ROWS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--only", "rates", "nonsense"], "error: --only: there is no row nonsense; rows: rates spo-sd15"),
        (["--device", "cpu"], "error: --device cpu takes --size small"),
        (["--write-docs", "nowhere.json"], "error: nowhere.json is no result of bench.gpu"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: there is no CUDA device; `--device cpu --size small`")


def test_the_miniature_is_checks_own() -> None:
    assert (CHECKED_PROMPTS, CHECKED_PAIRS) == (check.SAMPLED, check.PAIRS)


def test_the_documentation_has_the_marks() -> None:
    text = (ROOT / gpu.DOCS).read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1


def test_rows_are_of_functions_that_exist() -> None:
    for row in ROWS:
        module, _, function = row.call.partition(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert len({row.name for row in ROWS}) == len(ROWS)
