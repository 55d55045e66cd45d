"""Who sees what: every pair once, repeated pairs swapped, nothing lost between two people or two starts."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spo.data.preferences import PreferencePair, read_preferences
from spo.errors import DataError
from spo.people.answers import Answers, check_annotator
from spo.people.desk import REPEAT_EVERY, Desk
from spo.people.pairs import Pair, Pool
from tests.people.conftest import ABOUT, NASTY


def choose(desk: Desk, name: str, choice: str) -> str:
    """Make a choice; the prompt of the pair."""
    state = desk.state(name)
    assert desk.choose(name, state["turn"], choice) is not None
    return state["prompt"]


def test_the_rows_are_preference_pairs_that_prepare_reads(new_desk, tmp_path: Path) -> None:
    desk = new_desk()
    lefts = [desk.state("anna")["left"]]
    for choice in ("left", "skip", "tie"):
        choose(desk, "anna", choice)
    won, tie = read_preferences("mine", root=tmp_path)
    assert isinstance(won, PreferencePair) and isinstance(tie, PreferencePair)
    shown = desk.picture(lefts[0])
    assert shown is not None
    assert shown.read_bytes() == (won.image_0 if won.label_0 else won.image_1)
    assert (won.caption, {won.label_0, won.label_1}) == (NASTY, {0.0, 1.0})
    assert (tie.caption, tie.is_tie) == ("prompt 2", True)


def test_a_new_start_continues_without_the_pairs_that_were_chosen_or_skipped(new_desk) -> None:
    desk = new_desk()
    for choice in ("left", "skip", "right"):
        choose(desk, "anna", choice)
    again = new_desk()
    state = again.state("anna")
    assert (state["prompt"], state["done"], state["mine"]) == ("prompt 3", 3, 2)
    assert again.undo("anna")["prompt"] == "prompt 2"
    assert again.undo("anna")["prompt"] == "prompt 1"  # the skipped pair
    assert again.undo("anna")["prompt"] == NASTY
    assert not again.undo("anna")["can_undo"]


def test_an_undone_choice_leaves_no_row_and_no_pictures(new_desk, tmp_path: Path) -> None:
    desk = new_desk()
    choose(desk, "anna", "left")
    choose(desk, "anna", "left")
    desk.undo("anna")
    images = sorted(path.name for path in (tmp_path / "mine" / "images").iterdir())
    assert images == ["p0-0.png", "p0-1.png"]
    assert len((tmp_path / "mine" / "anna.jsonl").read_text().splitlines()) == 1


def test_two_people_at_once_get_different_pairs_and_lose_no_choice(new_desk) -> None:
    desk = new_desk(num=60)

    def work(name: str) -> list[str]:
        return [choose(desk, name, "left") for _ in range(20)]

    with ThreadPoolExecutor() as threads:
        list(threads.map(work, ("anna", "ben", "cem")))
    again = new_desk(num=60).answers
    assert again.annotators == ["anna", "ben", "cem"]
    for name in again.annotators:
        answers = again.of(name)
        assert [answer.number for answer in answers] == list(range(1, 21))
        assert {answer.row["annotator"] for answer in answers} == {name}
    fresh = [answer.pair for name in again.annotators for answer in again.of(name) if not answer.repeat]
    assert len(fresh) == len(set(fresh)) == 3 * 19  # and each of them saw one pair twice


def test_of_a_study_everyone_sees_every_pair_in_an_order_of_their_own(new_desk) -> None:
    desk = new_desk(12, everyone=True)
    orders = {name: [choose(desk, name, "skip") for _ in range(12)] for name in ("anna", "ben")}
    assert sorted(orders["anna"]) == sorted(orders["ben"])
    assert orders["anna"] != orders["ben"]
    assert desk.state("anna")["turn"] is None


def test_each_side_has_each_picture_about_as_often(new_desk) -> None:
    desk = new_desk(200)
    for _ in range(200):
        choose(desk, "anna", "tie")
    lefts = [answer.left for answer in desk.answers.of("anna") if not answer.repeat]
    assert 60 <= sum(lefts) <= len(lefts) - 60


def test_repeated_pairs_come_after_every_ten_choices_and_count_as_agreement(new_desk) -> None:
    desk = new_desk()
    for _ in range(3 * REPEAT_EVERY + 3):
        choose(desk, "anna", "tie")
    answers = desk.answers.of("anna")
    again = [answer for answer in answers if answer.repeat]
    assert len(again) == 3 == len({answer.pair for answer in again})
    first = {answer.pair: answer for answer in answers if not answer.repeat}
    assert all(answer.left == 1 - first[answer.pair].left for answer in again)
    assert all(answer.number - first[answer.pair].number > 4 for answer in again)
    assert (desk.state("anna")["same"], desk.state("anna")["repeated"]) == (3, 3)


def test_a_choice_for_a_pair_that_is_no_longer_shown_is_not_written(new_desk) -> None:
    desk = new_desk()
    turn = desk.state("anna")["turn"]
    assert desk.choose("anna", turn, "left") is not None
    assert desk.choose("anna", turn, "left") is None
    assert desk.choose("ben", turn, "left") is None
    assert len(desk.answers.of("anna")) == 1
    assert desk.answers.of("ben") == []


def test_nothing_is_written_before_the_first_choice(new_desk, tmp_path: Path) -> None:
    desk = new_desk()
    desk.state("anna")
    with pytest.raises(DataError, match="use one of left, right, tie, skip"):
        desk.choose("anna", desk.state("anna")["turn"], "both")
    assert not (tmp_path / "mine").exists()


def test_a_pool_that_fails_at_once_raises_and_later_says_so(tmp_path: Path, capsys) -> None:
    def failing(first: list[Pair]):
        yield from first
        raise DataError("the disk is gone")

    with pytest.raises(DataError, match="the disk is gone"):
        Pool(failing([])).start()
    pool = Pool(failing([Pair("a", "a cross", (tmp_path / "0.png", tmp_path / "1.png"))]), total=9)
    pool.start()
    pool.join()
    assert (pool.error, pool.total, list(pool.ready)) == ("the disk is gone", 1, ["a"])
    assert "no more pairs: the disk is gone" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "  ", "../anna", "a/b", ".hidden", "x" * 41, None, 7, "a\0b", "con:1"])
def test_a_name_that_is_no_file_name_is_refused(name: object) -> None:
    with pytest.raises(DataError, match="cannot be used"):
        check_annotator(name)


def test_names_that_look_alike_are_one() -> None:
    assert check_annotator(" Zoe\u0308 Maria ") == check_annotator("zo\u00eb maria") == "zo\u00eb-maria"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("about.json", '{"made_by": "python -m spo study"}', "did not make it; use another NAME"),
        ("about.json", "[", "did not make it"),
        ("pairs.parquet", "", "did not make it"),
        ("anna.jsonl", '{"caption": "a"}', "anna.jsonl row 1 is none of ours: pair, label_0, left"),
        ("anna.jsonl", "{", "row 1 is none of ours: broken JSON"),
        ("skipped/anna.json", "{", "is no valid JSON"),
        ("skipped/anna.json", '[{"pair": 3}]', "row 1 is none of ours: pair, left"),
    ],
)
def test_a_folder_that_is_not_ours_is_refused_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = tmp_path / "mine"
    (folder / "skipped").mkdir(parents=True)
    if not name.endswith(("about.json", "parquet")):
        (folder / "about.json").write_text('{"made_by": "python -m spo label"}')
    (folder / name).write_text(text)
    before = sorted(folder.rglob("*"))
    with pytest.raises(DataError, match=message) as caught:
        Answers(folder, ABOUT, pictures=True)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before
