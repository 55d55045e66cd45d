"""A desk with drawn pictures, its page, and a browser."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

from spo.people.answers import Answers
from spo.people.desk import Desk
from spo.people.page import build_app
from spo.people.pairs import Pair, Pool
from spo.people.server import open_place
from tests.people import browser as chrome

ABOUT = {"made_by": "python -m spo label"}
NASTY = '<img src=x onerror="document.title=1"> & "quotes"'


def draw_pairs(folder: Path, num: int) -> list[Pair]:
    """Pairs of plain pictures; the first prompt has HTML in it."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    for i in range(num):
        files = folder / f"p{i}-0.png", folder / f"p{i}-1.png"
        for file, colour in zip(files, ((40 * i % 256, 90, 160), (200, 40 * i % 256, 60)), strict=True):
            Image.new("RGB", (16, 16), colour).save(file)
        pairs.append(Pair(f"p{i}", NASTY if i == 0 else f"prompt {i}", files, {"model": "drawn"}))
    return pairs


@pytest.fixture
def new_desk(tmp_path: Path) -> Callable[..., Desk]:
    """A desk over tmp_path/mine; called again, it is one that was started again."""

    def make(num: int = 40, *, everyone: bool = False) -> Desk:
        pool = Pool(draw_pairs(tmp_path / "drawn", num), total=num)
        pool.start()
        pool.join()
        return Desk(pool, Answers(tmp_path / "mine", ABOUT, pictures=True), everyone=everyone)

    return make


@contextlib.contextmanager
def served(desk: Desk) -> Iterator[str]:
    """The address of a desk's page."""
    place = open_place("127.0.0.1", 0)
    app = build_app(desk, title="label mine", question="Which picture is better?", access=place.access)
    settings = uvicorn.Config(app, log_level="warning", ws="none", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place.listener]})
    thread.start()
    try:
        yield place.url
    finally:
        server.should_exit = True
        thread.join()
        place.listener.close()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chrome.Browser]:
    if chrome.PROGRAM is None:
        pytest.skip("needs Chromium: none of " + ", ".join(chrome.NAMES) + " is installed")
    with chrome.chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started
