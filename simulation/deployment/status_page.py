"""The operator's page and `/metrics`, on 127.0.0.1 alone, with the token of the server's folder.

The token is made once and stays, for a program that reads the metrics; the page's address, with the token in its
fragment, lies in the folder while the server runs. Both files are their owner's alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from secrets import token_urlsafe

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from florilegium.client.agent.access import HEADERS, AccessControl
from florilegium.client.agent.connection_limits import by_user
from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.folder import write_private
from florilegium.client.agent.http_server import Bounds, open_server
from florilegium.simulation.deployment.certificates import STATUS_LINK, STATUS_TOKEN
from florilegium.simulation.deployment.status import Status

PAGE = {"/": "text/html", "/status.css": "text/css", "/status.js": "text/javascript"}
BOUNDS = Bounds(unauthenticated=16, unauthenticated_at_once=32, unauthenticated_a_minute=60)


@contextmanager
def showing_status(status: Status, port: int) -> Iterator[str]:
    """The page is there while this lasts; yields its address with the token. Raises `DeviceError`."""
    listens = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio lets it wait
    listens.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listens.bind(("127.0.0.1", port))
    except OSError:
        listens.close()
        raise DeviceError(f"port {port} of 127.0.0.1 is taken: --status-port 0 takes a free one") from None
    port, token = listens.getsockname()[1], _token_of(status.folder)
    app = AccessControl(_application(status), token, None, port, PAGE, "florilegium server page")
    link = status.folder / STATUS_LINK
    with open_server(app, listens, BOUNDS, headers=HEADERS, kind_of=by_user):
        address = f"http://127.0.0.1:{port}/#token={token}"
        link.unlink(missing_ok=True)  # of a server that was killed
        write_private(link, f"{address}\n".encode())
        try:
            yield address
        finally:
            link.unlink(missing_ok=True)


def _token_of(folder: Path) -> str:
    """Made where there is none. Raises `DeviceError` where others may read it."""
    path = folder / STATUS_TOKEN
    if not path.exists():
        write_private(path, token_urlsafe(32).encode())
    if os.stat(path).st_mode & 0o077:
        raise DeviceError(f"others may read {path}: delete it, and another is made")
    return path.read_text(encoding="ascii").strip()


def _application(status: Status) -> Starlette:
    return Starlette(
        routes=[
            *(Route(path, _page) for path in PAGE),
            Route("/api/status", partial(_answer, lambda: JSONResponse(status.told()))),
            Route("/metrics", partial(_answer, lambda: Response(status.metrics(), media_type=CONTENT_TYPE_LATEST))),
        ]
    )


async def _answer(make: Callable[[], Response], request: Request) -> Response:
    return await run_in_threadpool(make)


async def _page(request: Request) -> Response:
    name = "status.html" if request.url.path == "/" else request.url.path[1:]
    text = (resources.files("florilegium.simulation.deployment") / "page" / name).read_text(encoding="utf-8")
    return Response(text, media_type=PAGE[request.url.path])
