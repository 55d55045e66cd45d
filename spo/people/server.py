"""The server of the page: this machine alone can reach it, or those who have the token."""

import ipaddress
import secrets
import socket
from dataclasses import dataclass

import uvicorn

from spo.errors import SpoError
from spo.people.desk import Desk
from spo.people.page import Access, build_app


@dataclass(frozen=True)
class Place:
    """An open port, and the address to print."""

    listener: socket.socket
    url: str
    access: Access


def open_place(host: str, port: int) -> Place:
    """Listen on `host` and `port` (0: any free one); SpoError if that is not possible.

    A host that is not loopback gets a token, without which nothing is shown.
    """
    if not 0 <= port <= 65535:
        raise SpoError(f"--port {port} is no port; use a number from 1 to 65535, or 0 for any free one")
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(target[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise SpoError(f"cannot listen on {host} port {port}: {reason}; use another --port or --host") from None
    number = listener.getsockname()[1]
    address = ipaddress.ip_address(str(target[0]).partition("%")[0])
    if address.is_loopback:
        shown = f"[{address}]" if address.version == 6 else str(address)
        return Place(listener, f"http://{shown}:{number}", Access())
    token = secrets.token_urlsafe(24)
    shown = socket.gethostname() if address.is_unspecified else host
    return Place(listener, f"http://{shown}:{number}/?token={token}", Access(token=token))


def serve(desk: Desk, place: Place, *, title: str, question: str) -> None:
    """Serve the page until a signal comes, which is raised after the server has ended."""
    app = build_app(desk, title=title, question=question, access=place.access)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, ws="none", lifespan="off", timeout_graceful_shutdown=3,
        limit_concurrency=64,
    )  # fmt: skip
    print(f"{place.url} (stop with Ctrl-C)", flush=True)
    uvicorn.Server(settings).run(sockets=[place.listener])
