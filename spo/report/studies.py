"""The studies in which people compared the columns of this profile: what `python -m spo study` counted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.config import Config
from spo.errors import DataError
from spo.report.inputs import Row, read_json
from spo.runtime.hashing import file_checksum
from spo.workspace import Workspace

FIGURES = ("column", "against", "win_rate", "low", "high", "ties", "n", "prompts")
NEEDED = ("profile", "evaluation", "annotators", "comparisons", "between", "repeated")


@dataclass(frozen=True)
class Study:
    name: str
    num_annotators: int
    comparisons: list[Row]  # FIGURES of each two columns; low and high are None with one prompt
    between: Row | None  # agreement of annotators: share, low, high, n, alpha
    repeated: Row  # pairs that came again: same, n
    outdated: bool  # the pictures have been made anew since


def read_studies(config: Config, root: Path) -> list[Study]:
    """The profile's studies by name; empty where there are none. DataError if a file is broken."""
    workspace = Workspace(config, root)
    scores = workspace.evaluate / "scores.csv"
    studies = []
    for path in sorted(workspace.studies.glob("*/results.json")):
        remedy = f"study {path.parent.name} --results"
        found = read_json(path, remedy)
        if found.get("profile") != config.profile:
            continue
        _check(found, path, remedy)
        studies.append(
            Study(
                path.parent.name,
                len(found["annotators"]),
                found["comparisons"],
                found["between"],
                found["repeated"],
                outdated=found["evaluation"] != file_checksum(scores),
            )
        )
    return studies


def _check(found: dict[str, Any], path: Path, remedy: str) -> None:
    missing = [name for name in NEEDED if name not in found]
    missing += [name for row in found.get("comparisons", ()) for name in FIGURES if name not in row]
    if missing:
        raise DataError(f"{path} has no {missing[0]}; run `python -m spo {remedy}` again")
