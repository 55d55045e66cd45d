"""A run's journal: what it reports, on the disk before it is sent anywhere.

A folder mlflow/unsent/<id> with events.jsonl (one event a line), files/ (copies of pictures and artifacts) and
state.json (how far it has been sent). Its writer holds the lock; a journal whose lock is free was left behind by a
process that has ended. A crash or a full disk may tear off a line, which is left out; those after it are read.
"""

import json
import os
import shutil
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
        self._files = 0

    @classmethod
    def create(cls, unsent: Path) -> Self:
        """A new one, named so that names sort by time."""
        folder = unsent / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        (folder / "files").mkdir(parents=True)
        journal = cls(folder)
        journal._lock.acquire()
        return journal

    @classmethod
    def left_behind(cls, unsent: Path) -> Iterator[Self]:
        """Those of processes that have ended, oldest first, each held while it is looked at."""
        for folder in sorted(unsent.glob("*-*-*")):
            journal = cls(folder)
            try:
                with journal._lock.acquire(timeout=0):
                    if journal._events.is_file():
                        yield journal
            except (Timeout, OSError):  # its writer lives, or another process has just sent it
                continue

    def append(self, do: str, **what: Any) -> None:
        """Write an event; it is with the system when this returns."""
        line = json.dumps({"do": do, **what}).encode() + b"\n"
        with self._writing, self._events.open("ab+") as file:
            if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = b"\n" + line  # behind one that was torn
            file.write(line)

    def keep(self, source: Path, name: str) -> str:
        """Copy a file or folder into the journal, called `name`; where, relative to the journal."""
        target = self._room() / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
        return str(target.relative_to(self.folder))

    def keep_bytes(self, content: bytes, name: str) -> str:
        target = self._room() / name
        target.write_bytes(content)
        return str(target.relative_to(self.folder))

    def _room(self) -> Path:
        with self._writing:
            self._files += 1
            folder = self.folder / "files" / str(self._files)
        folder.mkdir()
        return folder

    def after(self, offset: int) -> Iterator[tuple[Event, int]]:
        """The events from a byte offset on, each with the offset behind it; a torn line is left out."""
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
        """What the sender has noted: offset, run_id and parent."""
        return json.loads(self._state.read_text(encoding="utf-8")) if self._state.is_file() else {"offset": 0}

    def note(self, state: Mapping[str, Any]) -> None:
        write_text(self._state, json.dumps(dict(state)))

    def release(self) -> None:
        self._lock.release()

    def remove(self) -> None:
        """Everything has arrived."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def unsent(root: Path) -> Path:
    """Where a project's journals are; ignored by git like all of mlflow/."""
    return Path(os.path.abspath(root)) / "mlflow" / "unsent"
