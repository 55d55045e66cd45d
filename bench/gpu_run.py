"""Rows run one after another, each under a guard, all against one deadline; what is found is on the disk at once."""

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.gpu_report import markdown
from bench.gpu_rows import Row
from spo.errors import is_out_of_memory, one_line
from spo.runtime.stopping import Stopped

MARGIN = 3.0  # seconds before the end at which measuring stops
MEASURED, TIME_OVER = "measured", "skipped: time over"


class TimeOver(BaseException):
    """The minutes are over; like a signal's, it is no Exception that a library would swallow."""


class LostDevice(Exception):
    """No later row of this process can run; the message is how the row ended."""


class Deadline:
    """The end of the minutes, on the monotonic clock."""

    def __init__(self, start: float, minutes: float):
        self.end = start + 60 * minutes - min(MARGIN, 6 * minutes)
        self.later = 0.0  # seconds that the rows after this one need

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def spare(self, seconds: float) -> bool:
        """Whether a repeat of so many seconds takes no time from the rows to come."""
        return self.left() - self.later >= seconds

    def limit(self, least: float) -> float:
        """Seconds that a row may take: it leaves the later rows what they need, but has its own least."""
        return min(self.left(), max(least, self.left() - self.later))

    @contextmanager
    def alarm(self, seconds: float) -> Iterator[None]:
        """Within it TimeOver is raised after so long, wherever Python is; only the main thread has alarms."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(*_: object) -> None:
            raise TimeOver

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds), 1.0)  # again, where the first was dropped
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Results:
    """The rows so far, kept in <folder>/gpu.json and, as Markdown, in <folder>/gpu.md."""

    def __init__(self, folder: Path, head: dict[str, Any]):
        self.head = head
        self.rows: list[dict[str, Any]] = []
        self.json_file, self.markdown_file = folder / "gpu.json", folder / "gpu.md"

    def add(self, name: str, status: str, seconds: float, figures: dict[str, Any]) -> None:
        self.rows.append({"name": name, "status": status, "row_seconds": round(seconds, 2), "figures": finite(figures)})
        write_whole(self.json_file, json.dumps(self.whole(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        write_whole(self.markdown_file, self.markdown() + "\n")

    def whole(self) -> dict[str, Any]:
        return {**self.head, "rows": self.rows}

    def markdown(self) -> str:
        return markdown(self.whole())


def run_rows(rows: Sequence[Row], bench: Any, results: Results) -> int:
    """Run them all; 0, or 1 where a row failed, or 128 + the number of the signal that ended the run."""
    for i, row in enumerate(rows):
        bench.deadline.later = sum(later.least for later in rows[i + 1 :]) * bench.full
        start = time.monotonic()
        figures: dict[str, Any] = {}
        try:
            status = attempt(row, bench, figures)
        except LostDevice as lost:
            results.add(row.name, str(lost), time.monotonic() - start, figures)
            _skip(rows[i + 1 :], "the device is lost", results)
            return 1
        except KeyboardInterrupt as stop:
            results.add(row.name, "stopped", time.monotonic() - start, figures)
            _skip(rows[i + 1 :], "stopped", results)
            return stop.exit_code if isinstance(stop, Stopped) else 130
        bench.figures[row.name] = figures
        results.add(row.name, status, time.monotonic() - start, figures)
        print(f"{row.name}: {status}, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return int(any(row["status"].startswith("failed") for row in results.rows))


def _skip(rows: Sequence[Row], why: str, results: Results) -> None:
    for row in rows:
        results.add(row.name, f"skipped: {why}", 0.0, {})


def attempt(row: Row, bench: Any, figures: dict[str, Any]) -> str:
    """Measure a row into `figures`; how it ended, in one line. Whatever it had in memory is let go of if it failed."""
    left, least = bench.deadline.left(), row.least * bench.full
    if left <= 0 or left < least:
        return TIME_OVER
    try:
        with bench.deadline.alarm(bench.deadline.limit(least)):
            row.measure(bench, figures)
    except TimeOver as over:
        forget(over)
        status = TIME_OVER
    except Exception as error:
        status = f"failed: {reason(error)}"
        forget(error)
    else:
        bench.tidy()
        return MEASURED
    try:
        bench.drop()
    except RuntimeError as error:  # CUDA's errors that no call of this process survives
        raise LostDevice(f"{status}; the device is lost to this process") from error
    return status


def reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, ImportError) and error.name:
        return f"the package {error.name} is missing"
    if is_out_of_memory(error):
        return f"out of memory: {one_line(error, 160)}"
    return f"{type(error).__name__}: {one_line(error, 200)}"


def forget(error: BaseException | None) -> None:
    """Let go of what the frames of an error and of those before it hold: tensors, mostly."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def finite(value: Any) -> Any:
    """The value with None for nan and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {str(name): finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or not there; spo.files does more, and needs more packages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
