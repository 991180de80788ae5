"""Who may ask something at the page's port: the page of this agent, opened by its owner, and programs with a token.

Each has its own token and its own paths: that of the page opens `/api/`, a program's opens `/v1/` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from hmac import compare_digest

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from florilegium.client.agent.api_tokens import ApiTokens
from florilegium.client.agent.http_json import error_response, openai_error
from florilegium.client.agent.http_server import connection_of

PAGE = {"/": "text/html", "/page.css": "text/css",
        **dict.fromkeys(("/page.js", "/markdown.js", "/charts.js"), "text/javascript")}  # fmt: skip
ENDPOINT = "/v1/"  # what begins so is for programs
Refuse = Callable[[int, str], Response]


class AccessControl:
    """Lets through what comes from the page of this agent, opened by its owner, and from programs that it let in."""

    def __init__(self, app: ASGIApp, token: str, tokens: ApiTokens, port: int) -> None:
        self.app, self.token, self.tokens = app, token, tokens
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await (self._refusal(Request(scope)) or self.app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        path: str = request.scope["path"]  # by which it is routed
        programs = path.startswith(ENDPOINT)
        refuse: Refuse = openai_error if programs else error_response
        origin = request.headers.get("origin")
        if request.headers.getlist("host") not in [[name] for name in self.hosts] or (
            origin is not None and origin not in {f"http://{name}" for name in self.hosts}
        ):
            return refuse(403, "this page belongs to 127.0.0.1")
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return refuse(403, "asked by another page")
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.tokens.knows(shown) if programs else compare_digest(shown.encode(), self.token.encode()):
            connection_of(request.scope).authenticate()
        elif programs:
            return refuse(401, "no token, or none of this device's: florilegium device token new NAME makes one")
        elif path not in PAGE:
            return refuse(401, "open the address that `florilegium device page` prints")
        return None
