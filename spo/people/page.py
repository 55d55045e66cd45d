"""The page in the browser, and who may ask for it.

Every request must name this machine's own host, or carry the token. A request that changes something must come from
the page itself. Nothing that a browser sends is ever used as a path.
"""

import json
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spo.errors import DataError, one_line
from spo.people.answers import check_annotator
from spo.people.desk import Desk

HOME = Path(__file__).parent
MAX_BODY = 4096  # bytes of a request
COOKIE = "spo-token"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self'; script-src 'self'; "
    "style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """Who may see the page: those who name one of `hosts`, or those with the token, if there is one."""

    hosts: frozenset[str] = frozenset({"127.0.0.1", "localhost", "[::1]"})
    token: str | None = None

    def refusal(self, request: Request) -> str | None:
        """Why the request is refused; None if it is not."""
        host = request.headers.get("host", "")
        if self.token is None and re.sub(r":\d+$", "", host).lower() not in self.hosts:
            return "this address is not served; use the address that the command printed"
        if self.token is not None and not self._has_token(request):
            return "the token is missing or wrong; use the whole address that the command printed"
        if request.method == "POST":
            origin = request.headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != host:
                return "a request from another site is refused"
            if request.headers.get("content-type") != "application/json":
                return "a request must be JSON"
        return None

    def _has_token(self, request: Request) -> bool:
        given = request.query_params.get("token") or request.cookies.get(COOKIE) or ""
        return self.token is not None and secrets.compare_digest(given.encode(), self.token.encode())


class Guard:
    """Refuses what `access` refuses, and adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self.access.refusal(Request(scope))
        app = self.app if refusal is None else PlainTextResponse(f"{refusal}\n", 403)
        await app(scope, receive, send_with_headers)


def build_app(desk: Desk, *, title: str, question: str, access: Access) -> Starlette:
    """The page for a desk. `title` and `question` are shown as text."""

    async def page(request: Request) -> Response:
        if "token" not in request.query_params:
            return FileResponse(HOME / "page.html")
        answer = RedirectResponse("/", 303)  # so that the token stays out of the address
        answer.set_cookie(COOKIE, access.token or "", httponly=True, samesite="lax")
        return answer

    async def state(request: Request, body: dict[str, Any], annotator: str) -> Response:
        return JSONResponse(await run_in_threadpool(desk.state, annotator) | {"title": title, "question": question})

    async def choose(request: Request, body: dict[str, Any], annotator: str) -> Response:
        turn, choice = str(body.get("turn")), str(body.get("choice"))
        after = await run_in_threadpool(desk.choose, annotator, turn, choice)
        if after is None:  # a second tab, or a second click: nothing is written
            return JSONResponse(await run_in_threadpool(desk.state, annotator), 409)
        return JSONResponse(after)

    async def undo(request: Request, body: dict[str, Any], annotator: str) -> Response:
        return JSONResponse(await run_in_threadpool(desk.undo, annotator))

    async def picture(request: Request) -> Response:
        path = desk.picture(request.path_params["name"])
        return PlainTextResponse("no such picture\n", 404) if path is None else FileResponse(path)

    def static(name: str) -> Route:
        async def send(_: Request) -> Response:
            return FileResponse(HOME / name)

        return Route(f"/{name}", send)

    return Starlette(
        routes=[
            Route("/", page),
            static("page.css"),
            static("page.js"),
            Route("/picture/{name}", picture),
            Route("/state", _of_annotator(state), methods=["POST"]),
            Route("/choose", _of_annotator(choose), methods=["POST"]),
            Route("/undo", _of_annotator(undo), methods=["POST"]),
        ],
        middleware=[Middleware(Guard, access=access)],
    )


Endpoint = Callable[[Request, dict[str, Any], str], Awaitable[Response]]


def _of_annotator(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that gets a small JSON object with an annotator's name; anything else is answered with an error."""

    async def checked(request: Request) -> Response:
        try:
            body = await _body(request)
            return await endpoint(request, body, check_annotator(body.get("annotator")))
        except DataError as error:
            return JSONResponse({"error": str(error)}, 400)
        except OSError as error:  # a full disk: nothing was written, and the choice can be made again
            return JSONResponse({"error": f"the choice was not saved: {one_line(error)}"}, 500)

    return checked


async def _body(request: Request) -> dict[str, Any]:
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise DataError(f"the request is too large; at most {MAX_BODY} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError("the request is no JSON object")
    return value
