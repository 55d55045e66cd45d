"""The page in a real browser: keys, clicks and swipes become rows, on a desk and on a phone."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spo.people.answers import Answers
from spo.people.desk import Desk
from spo.people.pairs import Pair, Pool
from tests.people.browser import Browser, Page
from tests.people.conftest import ABOUT, NASTY, draw_pairs, served

TURN = "document.body.dataset.turn"


def rows(folder: Path, annotator: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{annotator}.jsonl").read_text().splitlines()]


def enter(page: Page, url: str, name: str) -> None:
    page.open(url)
    page.type("#name", name)
    page.click("#who button")
    page.until(f"{TURN} && !document.getElementById('task').hidden")


def after(page: Page, act: Any) -> None:
    """Do something that ends the turn, and wait for the next one."""
    before = page.value(TURN)
    act()
    page.until(f"{TURN} !== {json.dumps(before)}")


def test_keys_and_clicks_become_rows_and_undo_takes_the_last_back(browser: Browser, new_desk, tmp_path: Path) -> None:
    with served(new_desk()) as url:
        page = browser.page()
        enter(page, url, "Anna")
        for act in (
            lambda: page.press("ArrowLeft"),
            lambda: page.press("ArrowRight"),
            lambda: page.press("ArrowUp"),
            lambda: page.press("ArrowDown"),
            lambda: page.click("#left"),
            lambda: page.click("nav [data-choice=tie]"),
        ):
            after(page, act)
        found = rows(tmp_path / "mine", "anna")
        assert [row["pair"] for row in found] == ["p0", "p1", "p2", "p4", "p5"]  # p3 was skipped
        left, right, tie, clicked, _ = found
        assert left["label_0"] == 1 - left["left"]  # 1 if picture 0 was on the left
        assert right["label_0"] == right["left"]
        assert tie["label_0"] == tie["label_1"] == 0.5
        assert clicked["label_0"] == 1 - clicked["left"]

        after(page, lambda: page.press("u"))
        assert [row["pair"] for row in rows(tmp_path / "mine", "anna")] == ["p0", "p1", "p2", "p4"]
        assert page.text("#prompt") == "prompt 5"
        assert page.text("#progress").startswith("5 of 40 pairs \u00b7 4 by you")


def test_a_prompt_is_shown_as_text_and_the_page_runs_no_other_code(browser: Browser, new_desk) -> None:
    with served(new_desk()) as url:
        page = browser.page()
        enter(page, url, "Anna")
        assert page.text("#prompt") == NASTY
        assert page.value("document.title") == "label mine"
        assert page.value("document.querySelectorAll('img').length") == 2
        blocked = "new Promise((done) => { const s = document.createElement('script'); s.text = 'window.bad = 1';"
        assert page.value(blocked + " document.body.append(s); done(window.bad === undefined); })")


def test_a_phone_shows_all_without_scrolling_and_takes_swipes(browser: Browser, new_desk, tmp_path: Path) -> None:
    with served(new_desk()) as url:
        page = browser.page(width=390, height=844, phone=True)
        enter(page, url, "Ben")
        assert page.value("document.documentElement.scrollWidth") <= 390
        assert page.value("document.querySelector('nav').getBoundingClientRect().bottom") <= 844
        shown = [page.value(f"getComputedStyle(document.querySelector('{it}')).display") for it in ("kbd", ".touch")]
        assert shown == ["none", "block"]
        for x, y in ((-120, 5), (120, 5), (5, -120), (5, 120)):
            after(page, lambda x=x, y=y: page.swipe("#pictures", x, y))
        left, right, tie = rows(tmp_path / "mine", "ben")
        assert left["label_0"] == 1 - left["left"]
        assert right["label_0"] == right["left"]
        assert tie["label_0"] == 0.5


def test_a_page_that_is_opened_again_continues_where_it_stopped(browser: Browser, new_desk) -> None:
    page = browser.page()
    with served(new_desk()) as url:
        enter(page, url, "Anna")
        after(page, lambda: page.press("ArrowLeft"))
        page.open(f"{url}/?")  # the same address again
        page.until(TURN)
        assert page.text("#prompt") == "prompt 1"
        assert page.text("#leave") == "anna"


def test_repeated_pairs_swap_sides_and_their_agreement_is_shown(browser: Browser, new_desk, tmp_path: Path) -> None:
    with served(new_desk()) as url:
        page = browser.page()
        enter(page, url, "Anna")
        for _ in range(11):  # always left: a repeated pair gets the other picture
            after(page, lambda: page.press("ArrowLeft"))
        [again] = [row for row in rows(tmp_path / "mine", "anna") if row["repeat"]]
        first = next(row for row in rows(tmp_path / "mine", "anna") if row["pair"] == again["pair"])
        assert (again["left"], again["label_0"]) == (1 - first["left"], 1 - first["label_0"])
        assert page.text("#progress").endswith("0 of 1 repeated pairs chosen alike")


def test_the_last_pair_ends_with_thanks(browser: Browser, new_desk) -> None:
    with served(new_desk(2)) as url:
        page = browser.page()
        enter(page, url, "Anna")
        after(page, lambda: page.press("ArrowLeft"))
        page.press("ArrowLeft")
        assert page.until("document.getElementById('message').textContent") == "That was the last pair. Thank you!"
        assert page.value("document.getElementById('task').hidden")


def test_a_name_that_cannot_be_used_is_told(browser: Browser, new_desk) -> None:
    with served(new_desk()) as url:
        page = browser.page()
        page.open(url)
        page.type("#name", "../anna")
        page.click("#who button")
        assert "cannot be used" in page.until("document.getElementById('message').textContent")


def test_the_page_waits_for_pictures_that_are_being_made(browser: Browser, tmp_path: Path) -> None:
    go_on = threading.Event()

    def slowly() -> Iterator[Pair]:
        first, second = draw_pairs(tmp_path / "drawn", 2)
        yield first
        go_on.wait()
        yield second

    pool = Pool(slowly(), total=2)
    pool.start()
    try:
        with served(Desk(pool, Answers(tmp_path / "mine", ABOUT, pictures=True), everyone=False)) as url:
            page = browser.page()
            enter(page, url, "Anna")
            page.press("ArrowLeft")
            waiting = "The next pictures are being made."
            page.until(f"document.getElementById('message').textContent === {json.dumps(waiting)}")
            go_on.set()
            page.until(TURN)
            assert page.text("#prompt") == "prompt 1"
    finally:
        go_on.set()
        pool.close()


def test_a_server_that_has_ended_is_told(browser: Browser, new_desk) -> None:
    page = browser.page()
    with served(new_desk()) as url:
        enter(page, url, "Anna")
    page.press("ArrowLeft")
    assert "does not answer" in page.until("document.getElementById('message').textContent")
