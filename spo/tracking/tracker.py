"""A stage reports to a tracker; no call waits for a network."""

import io
import re
import sys
import time
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.runtime.text import flatten
from spo.tracking.journal import Journal

if TYPE_CHECKING:
    from PIL.Image import Image

PARENT = "pipeline run"  # stands for the pipeline's run in the journal


class Tracker:
    """Receives a stage's reports. A failure is reported once and never ends the stage."""

    address = "not tracked"  # where people find the pipeline's run

    @property
    def pipeline(self) -> "Tracker":
        """The tracker of the pipeline's run, which the stage belongs to."""
        return self

    def result(self, name: str, tags: Mapping[str, str]) -> "Tracker":
        """The tracker of a new run beside the stage's: methods' runs with equal metric names can be compared."""
        return self

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Texts that describe the run; `mlflow.note.content` is its description."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings; nested ones get dotted names."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers at a step; nested ones get dotted names, and other values are ignored."""

    def log_image(self, name: str, image: "Image") -> None:
        """A picture, as <name>.png."""

    def log_text(self, name: str, text: str) -> None:
        """A text file called `name`."""

    def log_artifact(self, path: Path) -> None:
        """A file or folder that exists."""


class NullTracker(Tracker):
    """Ignores all reports: for tests, and for the later processes of a distributed run."""


class JournalTracker(Tracker):
    """Writes to the run's journal, which the sender sends to MLflow."""

    def __init__(self, journal: Journal, of: str = ""):
        self.journal = journal
        self.of = of  # whose run the reports are for: "" of the stage, PARENT of the pipeline, or the name of a result
        self._warned = False

    @property
    def pipeline(self) -> Tracker:
        return JournalTracker(self.journal, PARENT)

    def result(self, name: str, tags: Mapping[str, str]) -> Tracker:
        tracker = JournalTracker(self.journal, name)
        tracker._append("result", tags=dict(tags), time=int(time.time() * 1000))
        return tracker

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append("tags", tags=dict(tags))

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._append("params", params={_clean(name): str(value) for name, value in flatten(params).items()})

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        now = int(time.time() * 1000)
        rows = [
            [_clean(name), float(value), now, step or 0]
            for name, value in flatten(metrics).items()
            if isinstance(value, Real)
        ]
        self._append("metrics", rows=rows)

    def log_image(self, name: str, image: "Image") -> None:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        self._append("file", f"{name}.png", buffer.getvalue())

    def log_text(self, name: str, text: str) -> None:
        self._append("file", name, text.encode())

    def log_artifact(self, path: Path) -> None:
        self._append("file", path.name, path)

    def _append(self, kind: str, name: str = "", content: Path | bytes = b"", **values: Any) -> None:
        """Write an event; one of kind "file" has a content called `name`, which may include folders."""
        try:
            if kind == "file":
                folder, _, leaf = name.rpartition("/")
                values = {"path": self.journal.keep(content, leaf), "folder": folder or None}
            self.journal.append(kind, **values, **({"of": self.of} if self.of else {}))
        except OSError as error:
            if not self._warned:
                print(f"warning: tracking lost something: {error}", file=sys.stderr, flush=True)
            self._warned = True


def _clean(name: str) -> str:
    """The name with only characters that MLflow accepts."""
    return re.sub(r"[^\w\-. /:]", "_", name)
