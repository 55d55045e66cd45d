"""A blind study: the evaluation's columns side by side, and what the choices say about them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from spo.config import Config
from spo.errors import DataError
from spo.evaluation.model_variants import CONTROL
from spo.evaluation.statistics import mean_interval
from spo.evaluation.tables import compared
from spo.people.answers import Answer, Answers
from spo.people.desk import agreement
from spo.people.pairs import Pair
from spo.report.gallery import first_pictures
from spo.report.inputs import read_csv
from spo.runtime.hashing import file_checksum, short_hash
from spo.workspace import Workspace

COLUMNS = ("column", "training_seed", "sampler", "prompt_index", "image_index", "prompt")  # of scores.csv


def study_pairs(config: Config, columns: Sequence[str], num_prompts: int, root: Path = Path()) -> list[Pair]:
    """Every two of the columns on the first test prompts, from the pictures that `evaluate` kept.

    columns: empty for all but the control. DataError if one does not exist, or a picture is missing.
    """
    evaluate = Workspace(config, root).evaluate
    scores = read_csv(evaluate / "scores.csv", "evaluate", COLUMNS)
    prompts, places = first_pictures(scores, config.evaluate.deciding)
    known = [name for name in places if name != CONTROL]
    if wrong := [name for name in columns if name not in places]:
        raise DataError(f"--columns {wrong[0]!r} was not evaluated; use some of {[*places]}")
    chosen = [name for name in places if name in (columns or known)]
    if len(chosen) < 2:
        raise DataError(f"a study compares at least two columns, got {chosen}; there are {[*places]}")
    pairs = []
    for name, against in compared(chosen):
        for index in sorted(prompts)[:num_prompts]:
            files = (_picture(evaluate, places[name], index), _picture(evaluate, places[against], index))
            identity = short_hash("\n".join([name, against, prompts[index], *map(file_checksum, files)]))
            pairs.append(Pair(identity, prompts[index], files, {"column_0": name, "column_1": against}))
    return pairs


def about_study(config: Config, root: Path = Path()) -> dict[str, Any]:
    """What a study belongs to: a profile, and one evaluation of it."""
    scores = Workspace(config, root).evaluate / "scores.csv"
    if not scores.is_file():
        raise DataError(f"{scores} is missing; run `python -m spo evaluate` first")
    return {"made_by": "python -m spo study", "profile": config.profile, "evaluation": file_checksum(scores)}


def results(answers: Answers, *, samples: int) -> dict[str, Any]:
    """Win rates with 95% intervals over prompts, and how far people agree with each other and with themselves."""
    first = {
        name: [answer for answer in answers.of(name) if answer.label is not None and not answer.repeat]
        for name in answers.annotators
    }
    own = [agreement(answers.of(name)) for name in first]
    return {
        "annotators": {name: len(found) for name, found in first.items()},
        "comparisons": _comparisons([answer for found in first.values() for answer in found], samples),
        "between": _between(first, samples),
        "repeated": {"same": sum(same for same, _ in own), "n": sum(of for _, of in own)},
    }


def alpha(units: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's alpha of nominal choices: 1 is full agreement, 0 what chance gives.

    units: the choices of several people about each thing, any number of them (Krippendorff 2011, "Computing
    Krippendorff's alpha-reliability", section C). None if fewer than two people judged anything, or all choices are
    equal.
    """
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    n = len(values)
    observed = sum(sum(a != b for a, b in combinations(unit, 2)) * 2 / (len(unit) - 1) for unit in units)
    expected = n**2 - sum(count**2 for count in Counter(values).values())
    return None if not expected else 1 - (n - 1) * observed / expected


def summary(found: dict[str, Any]) -> str:
    """The results as lines for the terminal."""
    lines = [
        f"{row['column']} against {row['against']}: better in {row['win_rate']:.0%}{_brackets(row)} "
        f"of {row['n']} choices, {row['ties']} ties"
        for row in found["comparisons"]
    ]
    if between := found["between"]:
        chance = "" if between["alpha"] is None else f", Krippendorff's alpha {between['alpha']:.2f}"
        lines.append(f"annotators agree in {between['share']:.0%} of {between['n']} common judgements{chance}")
    if repeated := found["repeated"]["n"]:
        lines.append(f"repeated pairs chosen alike: {found['repeated']['same']} of {repeated}")
    return "\n".join(lines) or "no choices yet"


def _comparisons(answers: Sequence[Answer], samples: int) -> list[dict[str, Any]]:
    """A row for each two columns; a tie counts half. All choices about a prompt are resampled together."""
    of: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        of.setdefault((answer.row["column_0"], answer.row["column_1"]), []).append(answer)
    rows = []
    for (column, against), own in of.items():
        labels, prompts = [answer.label for answer in own], [answer.row["caption"] for answer in own]
        share = sum(label or 0 for label in labels) / len(labels)
        row = {"column": column, "against": against, "win_rate": round(share, 5)}
        rows.append(row | _interval(labels, prompts, samples) | {
            "ties": labels.count(0.5), "n": len(own), "prompts": len(set(prompts))})  # fmt: skip
    return rows


def _between(first: dict[str, list[Answer]], samples: int) -> dict[str, Any] | None:
    """Agreement of annotators on the same pairs; None if no pair has two annotators."""
    judged: dict[str, list[Answer]] = {}
    for found in first.values():
        for answer in found:
            judged.setdefault(answer.pair, []).append(answer)
    units = [unit for unit in judged.values() if len(unit) > 1]
    both = [(a, b) for unit in units for a, b in combinations(unit, 2)]
    if not both:
        return None
    same = [float(a.label == b.label) for a, b in both]
    chance_corrected = alpha([[answer.label or 0.0 for answer in unit] for unit in units])
    return {
        "share": round(sum(same) / len(same), 5),
        **_interval(same, [a.row["caption"] for a, _ in both], samples),
        "n": len(same),
        "alpha": None if chance_corrected is None else round(chance_corrected, 5),
    }


def _interval(values: Sequence[float | None], prompts: Sequence[str], samples: int) -> dict[str, float | None]:
    """low and high over prompts; None with fewer than two prompts."""
    if len(set(prompts)) < 2:
        return {"low": None, "high": None}
    found = asdict(mean_interval([value or 0.0 for value in values], prompts, samples=samples))
    return {name: round(min(max(found[name], 0.0), 1.0), 5) for name in ("low", "high")}


def _brackets(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f" [{row['low']:.0%}, {row['high']:.0%}]"


def _picture(evaluate: Path, place: str, index: int) -> Path:
    path = evaluate / "images" / place / f"{index:04d}-0.png"
    if not path.is_file():
        raise DataError(f"{path} is missing; run `dvc checkout`, `dvc pull` or `python -m spo evaluate`")
    return path
