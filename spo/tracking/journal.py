"""A run's journal: its events on the disk, before they are sent.

The folder mlflow/unsent/<id> has events.jsonl (one event a line), files/ (copies of pictures and artifacts) and
state.json (how much has been sent). The writer holds a lock; if it is free, the writer has ended. A crash or a full
disk may cut a line off; this line is skipped, and the lines after it are read.
"""

import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from spo.runtime.files import write_text

Event = dict[str, Any]


class Journal:
    """Events in the order they were reported; safe to write from several threads."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.id = folder.name
        self._lock = FileLock(folder / "lock", thread_local=False)
        self._writing = threading.Lock()
        self._events = folder / "events.jsonl"
        self._state = folder / "state.json"

    @classmethod
    def create(cls, unsent: Path) -> Self:
        """A new journal; names sort by time."""
        folder = unsent / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        (folder / "files").mkdir(parents=True)
        journal = cls(folder)
        journal._lock.acquire()
        return journal

    @classmethod
    def left_behind(cls, unsent: Path) -> Iterator[Self]:
        """The journals of processes that have ended, oldest first; each is locked while it is used."""
        for folder in sorted(unsent.glob("*-*-*")):
            journal = cls(folder)
            try:
                with journal._lock.acquire(timeout=0):
                    if journal._events.is_file():
                        yield journal
            except (Timeout, OSError):  # its writer is running, or another process has just sent it
                continue

    def append(self, do: str, **values: Any) -> None:
        """Write an event; the operating system has it when this returns."""
        line = json.dumps({"do": do, **values}).encode() + b"\n"
        with self._writing, self._events.open("ab+") as file:
            if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = b"\n" + line  # after a line that was cut off
            file.write(line)

    def keep(self, content: Path | bytes, name: str) -> str:
        """Copy a file, a folder or bytes into the journal as `name`; returns the path relative to the journal."""
        target = Path(tempfile.mkdtemp(dir=self.folder / "files")) / name
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copytree(content, target) if content.is_dir() else shutil.copyfile(content, target)
        return str(target.relative_to(self.folder))

    def after(self, offset: int) -> Iterator[tuple[Event, int]]:
        """The events from a byte offset on, each with the offset of its end; a broken line is skipped."""
        if not self._events.is_file():
            return
        with self._events.open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if not line.endswith(b"\n"):
                    return
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                yield event, offset

    def state(self) -> Event:
        """The sender's notes: offset, run_id and parent."""
        return json.loads(self._state.read_text(encoding="utf-8")) if self._state.is_file() else {"offset": 0}

    def note(self, state: Mapping[str, Any]) -> None:
        write_text(self._state, json.dumps(dict(state)))

    def release(self) -> None:
        self._lock.release()

    def remove(self) -> None:
        """Remove the journal, since the store has all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def unsent(root: Path) -> Path:
    """The folder of a project's journals; git ignores all of mlflow/."""
    return Path(os.path.abspath(root)) / "mlflow" / "unsent"
