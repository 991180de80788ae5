"""Who may ask something at a page's port: the page, opened by its owner, and at an agent's programs with a token.

Each has its own token and its own paths: a program's opens `/v1/` and nothing else, that of the page opens the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from hmac import compare_digest

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from florilegium.client.agent.api_tokens import ApiTokens
from florilegium.client.agent.http_json import error_response, openai_error
from florilegium.client.agent.http_server import connection_of

PAGE = {"/": "text/html", "/page.css": "text/css",
        **dict.fromkeys(("/page.js", "/markdown.js", "/charts.js"), "text/javascript")}  # fmt: skip
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
ENDPOINT = "/v1/"  # what begins so is for programs
Refuse = Callable[[int, str], Response]


class AccessControl:
    """Lets through what comes from this port's page, opened by its owner, and from programs that it let in."""

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        tokens: ApiTokens | None,
        port: int,
        page: Container[str] = PAGE,
        command: str = "florilegium device page",
    ) -> None:
        """Without `tokens` there is nothing for programs; `page` is what everybody may have, `command` the way in."""
        self.app, self.token, self.tokens, self.page, self.command = app, token, tokens, page, command
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await (self._refusal(Request(scope)) or self.app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        path: str = request.scope["path"]  # by which it is routed
        tokens = self.tokens if path.startswith(ENDPOINT) else None
        refuse: Refuse = openai_error if tokens else error_response
        origin = request.headers.get("origin")
        if request.headers.getlist("host") not in [[name] for name in self.hosts] or (
            origin is not None and origin not in {f"http://{name}" for name in self.hosts}
        ):
            return refuse(403, "this page belongs to 127.0.0.1")
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return refuse(403, "asked by another page")
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if tokens.knows(shown) if tokens else compare_digest(shown.encode(), self.token.encode()):
            connection_of(request.scope).authenticate()
        elif tokens:
            return refuse(401, "no token, or none of this device's: florilegium device token new NAME makes one")
        elif path not in self.page:
            return refuse(401, f"open the address that `{self.command}` prints")
        return None
