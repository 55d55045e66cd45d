"""What a stage reports to; no call waits for a network."""

import io
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spo.runtime.text import flatten
from spo.tracking.journal import Journal

if TYPE_CHECKING:
    from PIL.Image import Image


class Tracker(Protocol):
    """Receives a stage's reports; a failure is reported once and never ends the stage."""

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


class NullTracker:
    """Ignores all reports: for tests, and for the later processes of a distributed run."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        pass

    def log_image(self, name: str, image: "Image") -> None:
        pass

    def log_text(self, name: str, text: str) -> None:
        pass

    def log_artifact(self, path: Path) -> None:
        pass


class JournalTracker:
    """Writes to the run's journal, which the sender sends to MLflow."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self._complained = False

    def log_params(self, params: Mapping[str, Any]) -> None:
        rows = {clean(name): str(value) for name, value in flatten(params).items()}
        self._try(self.journal.append, "params", params=rows)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        now = int(time.time() * 1000)
        rows = [
            [clean(name), float(value), now, step or 0]
            for name, value in flatten(metrics).items()
            if not isinstance(value, str | None)
        ]
        self._try(self.journal.append, "metrics", rows=rows)

    def log_image(self, name: str, image: "Image") -> None:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        self._file(f"{name}.png", lambda leaf: self.journal.keep_bytes(buffer.getvalue(), leaf))

    def log_text(self, name: str, text: str) -> None:
        self._file(name, lambda leaf: self.journal.keep_bytes(text.encode(), leaf))

    def log_artifact(self, path: Path) -> None:
        self._file(path.name, lambda leaf: self.journal.keep(path, leaf))

    def _file(self, name: str, keep: Callable[[str], str]) -> None:
        """Add a file called `name`, which may include folders."""
        folder, _, leaf = name.rpartition("/")

        def write() -> None:
            self.journal.append("file", path=keep(leaf), folder=folder or None)

        self._try(write)

    def _try(self, call: Callable[..., None], *arguments: Any, **options: Any) -> None:
        try:
            call(*arguments, **options)
        except OSError as error:
            if not self._complained:
                print(f"warning: tracking lost something: {error}", file=sys.stderr, flush=True)
            self._complained = True


def clean(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. /:]", "_", name)
