"""What people chose: a file of rows for each annotator, written whole after every choice.

    FOLDER/about.json              says which command made the folder
    FOLDER/<annotator>.jsonl       a row for each choice; `prepare` reads these files
    FOLDER/images/                 the pictures that the rows name, if the rows have pictures
    FOLDER/skipped/<annotator>.json  the pairs that were skipped, which are no rows

Every annotator has a file, so two of them never write to the same one. The methods are not safe for threads; `Desk` has
the lock.
"""

import json
import re
import shutil
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spo.data.rows import RowError, json_lines
from spo.errors import DataError
from spo.people.pairs import Pair
from spo.runtime.files import atomic_path, read_json, write_json, write_text

ABOUT = "about.json"
LONGEST_NAME = 40  # characters
NEEDED = {"pair": str, "caption": str, "label_0": float, "left": int, "repeat": bool, "number": int}
_NAME = re.compile(rf"\w[\w-]{{0,{LONGEST_NAME - 1}}}")


@dataclass(frozen=True)
class Answer:
    """One choice. `label` is picture 0's: 1 better, 0 worse, .5 a tie, None skipped."""

    pair: str
    label: float | None
    left: int  # the picture that was on the left, 0 or 1
    repeat: bool  # the pair came again
    number: int  # from 1, in the annotator's order
    row: Mapping[str, Any]


class Answers:
    """The choices in a folder. The folder is made with the first of them."""

    def __init__(self, folder: Path, about: Mapping[str, Any], *, pictures: bool):
        """`about` must agree with the folder's own; DataError if it does not or a row is broken."""
        self.folder = folder
        self.pictures = pictures
        self.about = about
        self._of: dict[str, list[Answer]] = {}
        if folder.exists():
            _check_about(folder, about)
            files = [*folder.glob("*.jsonl"), *(folder / "skipped").glob("*.json")]
            self._of = {name: _read(folder, name) for name in sorted({path.stem for path in files})}

    @property
    def annotators(self) -> list[str]:
        return [name for name, answers in self._of.items() if answers]

    def of(self, annotator: str) -> list[Answer]:
        """An annotator's choices in their order."""
        return list(self._of.get(annotator, ()))

    def add(self, annotator: str, pair: Pair, *, label: float | None, left: int, repeat: bool) -> None:
        """Write a choice, its pictures before its row."""
        before = self.of(annotator)
        number = before[-1].number + 1 if before else 1
        facts: dict[str, Any] = {"pair": pair.id, "left": left, "repeat": repeat, "number": number}
        if label is not None:
            facts = self._row(annotator, pair, label) | facts
        if not (self.folder / ABOUT).exists():
            write_json(self.folder / ABOUT, self.about)
        answer = Answer(pair.id, label, left, repeat, number, facts)
        self._write(annotator, [*before, answer], skips=label is None)

    def undo(self, annotator: str) -> None:
        """Take the annotator's last choice back, if there is one."""
        *before, last = self.of(annotator)
        self._write(annotator, before, skips=last.label is None)
        used = {answer.pair for name in self._of for answer in self.of(name) if answer.label is not None}
        if self.pictures and last.label is not None and last.pair not in used:
            for name in ("image_0", "image_1"):
                (self.folder / last.row[name]).unlink(missing_ok=True)

    def _row(self, annotator: str, pair: Pair, label: float) -> dict[str, Any]:
        row: dict[str, Any] = {"caption": pair.prompt}
        for i, picture in enumerate(pair.pictures if self.pictures else ()):
            name = f"images/{pair.id}-{i}{picture.suffix}"
            row[f"image_{i}"] = name
            if not (self.folder / name).exists():
                with atomic_path(self.folder / name) as temporary:
                    shutil.copyfile(picture, temporary)
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {**row, "label_0": label, "label_1": 1 - label, **pair.facts, "annotator": annotator, "time": time}

    def _write(self, annotator: str, answers: list[Answer], *, skips: bool) -> None:
        """Write the file that changes, then keep the answers in memory."""
        rows = [answer.row for answer in answers if (answer.label is None) == skips]
        if skips:
            write_json(self.folder / "skipped" / f"{annotator}.json", rows)
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(self.folder / f"{annotator}.jsonl", "".join(lines))
        self._of[annotator] = answers


def check_annotator(name: object) -> str:
    """An annotator's name as files have it: lower case, hyphens for spaces. DataError if it is no such name."""
    text = unicodedata.normalize("NFC", name).casefold() if isinstance(name, str) else ""
    text = "-".join(text.split())
    if not _NAME.fullmatch(text):
        raise DataError(
            f"the name {name!r:.60} cannot be used; use 1 to {LONGEST_NAME} letters, digits, hyphens and spaces"
        )
    return text


def check_folder_name(name: str) -> str:
    """A name of a folder of ours; DataError if it is more than a name."""
    if not _NAME.fullmatch(name):
        raise DataError(
            f"NAME {name!r} cannot be a folder's name; use 1 to {LONGEST_NAME} letters, digits, hyphens and underscores"
        )
    return name


def _check_about(folder: Path, about: Mapping[str, Any]) -> None:
    command = about["made_by"]
    try:
        own = read_json(folder / ABOUT)
    except (OSError, ValueError):
        own = None
    if not isinstance(own, dict) or own.get("made_by") != command:
        raise DataError(f"{folder} exists, but `{command}` did not make it; use another NAME")
    for key, value in about.items():
        if own.get(key) != value:
            raise DataError(
                f"{folder} was made with another {key}: {own.get(key)!r:.60}, now {value!r:.60}; use another NAME"
            )


def _read(folder: Path, annotator: str) -> list[Answer]:
    """The answers of an annotator's two files; DataError if one is broken."""
    rows, skipped = folder / f"{annotator}.jsonl", folder / "skipped" / f"{annotator}.json"
    found = [_answer(rows, number, value) for number, value in (json_lines(rows) if rows.exists() else ())]
    if skipped.exists():
        try:
            skips = read_json(skipped)
        except ValueError as error:
            raise DataError(f"{skipped} is no valid JSON: {error}; restore or remove it") from None
        found += [_answer(skipped, number, value, skip=True) for number, value in enumerate(_list(skips), start=1)]
    return sorted(found, key=lambda answer: answer.number)


def _list(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else [value]


def _answer(path: Path, line: int, value: object, *, skip: bool = False) -> Answer:
    needed = {name: kind for name, kind in NEEDED.items() if not skip or name not in ("caption", "label_0")}
    wrong = [name for name, kind in needed.items() if not isinstance(value, dict) or type(value.get(name)) is not kind]
    if isinstance(value, RowError) or not isinstance(value, dict) or wrong:
        why = value if isinstance(value, RowError) else f"{', '.join(wrong)} missing or of another type"
        raise DataError(f"{path} row {line} is none of ours: {why}; restore the file or remove the row")
    label = None if skip else value["label_0"]
    return Answer(value["pair"], label, value["left"], value["repeat"], value["number"], value)
