"""The studies in which people compared the columns of this profile: what `python -m spo study` counted."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from spo.config import Config
from spo.errors import DataError
from spo.report.inputs import read_json
from spo.runtime.hashing import file_checksum
from spo.workspace import Workspace


class Comparison(BaseModel):
    """How often people chose `column` over `against`; no interval with one prompt."""

    column: str
    against: str
    win_rate: float
    low: float | None
    high: float | None
    ties: int
    n: int  # choices
    prompts: int


class Between(BaseModel):
    """How often two annotators chose alike."""

    share: float
    n: int
    alpha: float | None


class Repeated(BaseModel):
    """Pairs that came again with the sides swapped, and how many of them were chosen alike."""

    same: int
    n: int


class Study(BaseModel):
    """The file results.json of a study, its name, and whether the pictures have been made anew since."""

    profile: str
    evaluation: str  # checksum of the scores of the pictures
    annotators: dict[str, int]
    comparisons: list[Comparison]
    between: Between | None
    repeated: Repeated
    name: str
    outdated: bool


def read_studies(config: Config, root: Path) -> list[Study]:
    """The profile's studies by name; empty where there are none. DataError if a file is broken."""
    workspace = Workspace(config, root)
    checksum = file_checksum(workspace.evaluate / "scores.csv")
    studies = []
    for path in sorted(workspace.studies.glob("*/results.json")):
        name = path.parent.name
        found = read_json(path, f"study {name} --results")
        if found.get("profile") != config.profile:
            continue
        try:
            study = Study.model_validate({**found, "name": name, "outdated": found.get("evaluation") != checksum})
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(
                f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; run `python -m spo study {name} "
                "--results` again"
            ) from None
        studies.append(study)
    return studies
