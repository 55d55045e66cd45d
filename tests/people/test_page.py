"""Who may ask for what: this machine's own page alone, or those with the token; no path, no large request."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from spo.errors import SpoError
from spo.people import server
from spo.people.desk import Desk
from spo.people.page import MAX_BODY, Access, build_app
from spo.people.server import open_place

Connect = Callable[..., TestClient]


@pytest.fixture
def connect(new_desk: Callable[..., Desk]) -> Connect:
    desk = new_desk()

    def make(host: str = "127.0.0.1:8000", token: str | None = None) -> TestClient:
        app = build_app(desk, title="t", question="q", access=Access(token=token))
        return TestClient(app, base_url=f"http://{host}")

    return make


def test_the_page_and_its_files_are_served_with_a_strict_policy(connect: Connect) -> None:
    for path in ("/", "/page.css", "/page.js"):
        answer = connect().get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in answer.text and "https://" not in answer.text  # nothing comes from elsewhere


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:9"])
def test_loopback_names_are_answered(connect: Connect, host: str) -> None:
    assert connect(host).get("/").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example"])
def test_a_name_that_was_pointed_at_this_machine_is_refused(connect: Connect, host: str) -> None:
    assert connect(host).get("/").status_code == 403


@pytest.mark.parametrize("path", ["/state", "/choose", "/undo"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ],
)
def test_a_request_of_another_site_changes_nothing(connect: Connect, path: str, headers: dict[str, str]) -> None:
    page = connect()
    turn = page.post("/state", json={"annotator": "anna"}).json()["turn"]
    body = {"annotator": "anna", "turn": turn, "choice": "left"}
    answer = page.post(path, json=body, headers={"content-type": "application/json", **headers})
    assert answer.status_code == 403
    assert page.post("/state", json={"annotator": "anna"}).json()["mine"] == 0


def test_the_page_itself_may_choose(connect: Connect) -> None:
    page = connect()
    body = {"annotator": "anna", "turn": page.post("/state", json={"annotator": "anna"}).json()["turn"]}
    answer = page.post("/choose", json=body | {"choice": "left"}, headers={"origin": "http://127.0.0.1:8000"})
    assert (answer.status_code, answer.json()["mine"]) == (200, 1)
    again = page.post("/choose", json=body | {"choice": "left"})
    assert (again.status_code, again.json()["mine"]) == (409, 1)
    assert page.post("/undo", json={"annotator": "anna"}).json()["mine"] == 0


def test_without_the_token_nothing_is_shown_and_with_it_the_address_loses_it(connect: Connect) -> None:
    page = connect("192.0.2.7:8000", token="secret")
    for path in ("/", "/?token=wrong", "/page.js", "/picture/x"):
        assert page.get(path).status_code == 403
    assert page.post("/state", json={"annotator": "anna"}).status_code == 403
    answer = page.get("/?token=secret")
    assert (answer.status_code, str(answer.url)) == (200, "http://192.0.2.7:8000/")
    assert page.post("/state", json={"annotator": "anna"}).status_code == 200
    assert "HttpOnly" in answer.history[0].headers["set-cookie"]


@pytest.mark.parametrize(
    "path",
    [
        "/picture/../page.py",
        "/picture/..%2fpage.py",
        "/picture/%2fetc%2fpasswd",
        "/../page.py",
        "/page.py",
        "/picture/",
    ],
)
def test_no_request_leaves_the_folder(connect: Connect, path: str) -> None:
    assert connect().get(path).status_code == 404


def test_pictures_are_those_of_the_turn_alone(connect: Connect, tmp_path: Path) -> None:
    page = connect()
    state = page.post("/state", json={"annotator": "anna"}).json()
    drawn = {(tmp_path / "drawn" / f"p0-{i}.png").read_bytes() for i in (0, 1)}
    assert {page.get(f"/picture/{state[side]}").content for side in ("left", "right")} == drawn
    assert "p0" not in str(state)
    assert page.get("/picture/p0-0.png").status_code == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "no JSON object"),
        (b"[1]", "no JSON object"),
        (b"{}", "cannot be used"),
        (b'{"annotator": "../../etc/passwd"}', "cannot be used"),
        (b'{"annotator": "' + b"x" * MAX_BODY + b'"}', "too large"),
        (b"[" * MAX_BODY, "no JSON object"),
        (b"\xff", "no JSON object"),
    ],
)
def test_a_bad_request_is_answered_in_words(connect: Connect, tmp_path: Path, body: bytes, message: str) -> None:
    answer = connect().post("/choose", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert not (tmp_path / "mine").exists()


def test_a_full_disk_is_told_and_the_choice_can_be_made_again(connect: Connect, monkeypatch) -> None:
    page = connect()
    body = {"annotator": "anna", "turn": page.post("/state", json={"annotator": "anna"}).json()["turn"]}
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("spo.people.answers.write_text", full)
        answer = page.post("/choose", json=body | {"choice": "left"})
    assert (answer.status_code, answer.json()) == (
        500,
        {"error": "the choice was not saved: [Errno 28] No space left on device"},
    )
    assert page.post("/choose", json=body | {"choice": "left"}).json()["mine"] == 1


def test_loopback_needs_no_token_and_any_other_address_gets_one(monkeypatch) -> None:
    with open_place("localhost", 0).listener as own:
        number = own.getsockname()[1]
    assert number > 0
    place = open_place("127.0.0.1", 0)
    with place.listener:
        assert (place.access.token, place.url) == (None, f"http://127.0.0.1:{place.listener.getsockname()[1]}")
    monkeypatch.setattr(server.socket, "gethostname", lambda: "box")
    everywhere = ".".join("0000")
    place = open_place(everywhere, 0)
    with place.listener:
        assert place.access.token is not None and len(place.access.token) >= 32
        assert place.url.startswith("http://box:") and place.url.endswith(f"/?token={place.access.token}")


def test_a_port_in_use_and_a_wrong_host_are_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(SpoError, match=f"127.0.0.1 port {number}: Address already in use; use another --port"):
            open_place("127.0.0.1", number)
    with pytest.raises(SpoError, match=r"cannot listen on 192\.0\.2\.1"):
        open_place("192.0.2.1", 0)
    with pytest.raises(SpoError, match="--port 70000 is no port"):
        open_place("127.0.0.1", 70000)
