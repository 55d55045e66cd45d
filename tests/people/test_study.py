"""Studies: blind pairs of the evaluation's columns, and figures that can be checked by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spo.config import Config, load_config
from spo.errors import DataError
from spo.people.answers import Answers
from spo.people.desk import Desk
from spo.people.pairs import Pair, Pool
from spo.people.study import about_study, alpha, results, study_pairs, summary
from spo.report.studies import read_studies
from spo.runtime.files import write_json

PLACES = {"base": "base", "spo": "spo/seed-3", "other": "other", "contrast": "contrast"}
ABOUT = {"made_by": "python -m spo study", "profile": "tiny", "evaluation": "x"}


@pytest.fixture
def config() -> Config:
    return load_config(Path(__file__).parents[2], "tiny")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project after `evaluate`: four columns, three prompts, a plain picture each."""
    folder = tmp_path / "runs/tiny/evaluate"
    rows = []
    for i, (column, place) in enumerate(PLACES.items()):
        (folder / "images" / place).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8), (50 * i, 80 * index, 9)).save(folder / "images" / place / f"{index:04d}-0.png")
            seed = place.partition("seed-")[2]
            rows += [
                {"column": column, "training_seed": seed, "sampler": sampler, "prompt_index": index, "image_index": 0,
                 "prompt": f"prompt {index}"} for sampler in ("ddim", "ddim-stochastic")
            ]  # fmt: skip
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_every_two_columns_meet_on_every_prompt_without_the_control(config: Config, root: Path) -> None:
    pairs = study_pairs(config, [], 2, root)
    assert [(p.facts["column_0"], p.facts["column_1"], p.prompt) for p in pairs] == [
        (*columns, f"prompt {index}")
        for columns in (("spo", "base"), ("other", "base"), ("spo", "other"))
        for index in (0, 1)
    ]
    assert pairs[0].pictures[0] == root / "runs/tiny/evaluate/images/spo/seed-3/0000-0.png"
    only = study_pairs(config, ["base", "contrast"], 9, root)
    assert {(p.facts["column_0"], p.facts["column_1"]) for p in only} == {("contrast", "base")}
    assert len(only) == 3


def test_the_browser_is_told_no_column(config: Config, root: Path) -> None:
    pool = Pool(study_pairs(config, [], 3, root))
    pool.start()
    pool.join()
    state = Desk(pool, Answers(root / "study", ABOUT, pictures=False), everyone=True).state("anna")
    shown = json.dumps(state)
    assert state["turn"] and not any(name in shown for name in PLACES)


@pytest.mark.parametrize(
    ("columns", "message"),
    [(["base", "nosuch"], "--columns 'nosuch' was not evaluated; use some of"), (["base"], "at least two columns")],
)
def test_columns_that_cannot_be_compared_are_told(config: Config, root: Path, columns: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        study_pairs(config, columns, 3, root)


def test_pictures_that_are_not_there_are_told(config: Config, root: Path) -> None:
    (root / "runs/tiny/evaluate/images/other/0001-0.png").unlink()
    with pytest.raises(DataError, match=r"0001-0\.png is missing; run `dvc checkout`"):
        study_pairs(config, [], 3, root)


def answered(folder: Path, choices: dict[str, list[tuple[int, float | None]]]) -> Answers:
    """Choices of each annotator: the prompt's number and the label of spo against base."""
    answers = Answers(folder, ABOUT, pictures=False)
    for name, found in choices.items():
        for index, label in found:
            columns = {"column_0": "spo", "column_1": "base"}
            pair = Pair(f"p{index}", f"prompt {index}", (folder, folder), columns)
            repeat = any(answer.pair == pair.id for answer in answers.of(name))
            answers.add(name, pair, label=label, left=0, repeat=repeat)
    return answers


def test_win_rates_ties_and_agreement_are_those_of_the_choices(tmp_path: Path) -> None:
    answers = answered(
        tmp_path / "study",
        {
            "anna": [(0, 1.0), (1, 1.0), (2, 0.0), (3, 0.5), (0, 1.0), (1, 0.0)],  # two came again
            "ben": [(0, 1.0), (1, 0.0), (2, 0.0), (3, None)],
        },
    )
    found = results(answers, samples=500)
    [row] = found["comparisons"]
    assert (row["column"], row["against"], row["n"], row["ties"], row["prompts"]) == ("spo", "base", 7, 1, 4)
    assert row["win_rate"] == pytest.approx(3.5 / 7, abs=1e-5)
    assert 0 <= row["low"] < row["win_rate"] < row["high"] <= 1
    assert (found["between"]["n"], found["between"]["share"]) == (3, pytest.approx(2 / 3, abs=1e-5))
    assert found["repeated"] == {"same": 1, "n": 2}
    assert found["annotators"] == {"anna": 4, "ben": 3}
    assert "spo against base: better in 50% [" in summary(found)
    again = Answers(tmp_path / "study", ABOUT, pictures=False)
    assert results(again, samples=500) == found


def test_one_prompt_gives_a_rate_without_an_interval(tmp_path: Path) -> None:
    found = results(answered(tmp_path / "study", {"anna": [(0, 1.0)]}), samples=50)
    assert (found["comparisons"][0]["win_rate"], found["comparisons"][0]["low"]) == (1.0, None)
    assert found["between"] is None
    assert summary(found) == "spo against base: better in 100% of 1 choices, 0 ties"


def test_without_choices_there_are_no_figures(tmp_path: Path) -> None:
    found = results(Answers(tmp_path / "study", ABOUT, pictures=False), samples=50)
    assert found["comparisons"] == [] and summary(found) == "no choices yet"


def test_alpha_is_that_of_krippendorffs_example() -> None:
    # Krippendorff 2011, section C: nominal data, four observers, missing values; alpha = 0.743
    table = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[float(row[i]) for row in table if row[i] != "."] for i in range(12)]
    assert alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_is_one_for_agreement_and_none_where_it_says_nothing() -> None:
    assert alpha([[1, 1], [0, 0], [0.5, 0.5]]) == 1
    assert alpha([[1], [0]]) is None
    assert alpha([[1, 1], [1, 1]]) is None
    chance = alpha([[a, b] for a in (0, 1) for b in (0, 1)] * 50)
    assert chance == pytest.approx(0, abs=0.01)


def test_a_study_of_other_pictures_needs_another_name(config: Config, root: Path) -> None:
    about = about_study(config, root)
    folder = root / "data/studies/tiny"
    Answers(folder, about, pictures=False).add("anna", Pair("p", "a", (root, root)), label=1.0, left=0, repeat=False)
    assert Answers(folder, about_study(config, root), pictures=False).annotators == ["anna"]
    with (root / "runs/tiny/evaluate/scores.csv").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"was made with another evaluation: .*; use another NAME"):
        Answers(folder, about_study(config, root), pictures=False)


def written(root: Path, name: str, **changes: Any) -> None:
    answers = answered(root / "choices" / name, {"anna": [(0, 1.0), (1, 0.0)], "ben": [(0, 1.0), (1, 1.0)]})
    found = {**ABOUT, **results(answers, samples=50), **changes}
    write_json(root / "data/studies" / name / "results.json", found)


def test_the_report_finds_its_profiles_studies_and_whether_they_are_of_its_pictures(config, root: Path) -> None:
    assert read_studies(config, root) == []
    written(root, "a", evaluation=about_study(config, root)["evaluation"])
    written(root, "b")
    written(root, "c", profile="sd15")
    assert [(study.name, study.outdated) for study in read_studies(config, root)] == [("a", False), ("b", True)]


@pytest.mark.parametrize("lost", ["comparisons", "between"])
def test_a_broken_result_is_told_with_the_command_that_makes_it(config: Config, root: Path, lost: str) -> None:
    written(root, "a")
    path = root / "data/studies/a/results.json"
    found = json.loads(path.read_text())
    del found[lost]
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match=f"{lost}: Field required; run `python -m spo study a --results` again"):
        read_studies(config, root)
