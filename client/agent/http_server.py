"""An HTTP server with limits: so many connections, so long a head, so much time for each part of a request.

uvicorn answers whoever is admitted here. It has no bound on connections that say nothing, on how slowly a head or a
body comes, or on TLS handshakes; whoever is not heard of within the time is cut off, and above the most connections the
newest is refused at once. Who has not shown yet that it may ask counts as unauthenticated
(`client.agent.connection_limits`): those have fewer places, so many in a minute, and one request each. Nothing of a
request is logged, of an error its kind alone.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import h11
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from florilegium.client.agent.connection_limits import Rate, kernel_tells, network_of, nobody
from florilegium.client.agent.errors import DeviceError

log = logging.getLogger(__name__)
READY_S = 30.0
RECORD_BYTES = 2**14
REMEMBERED = 4096  # kinds of clients whose arrivals are counted
CONNECTION = "connection"  # in the state of the requests of a connection
KindOf = Callable[[str, socket.socket], str]  # an address, a connection → kind of unauthenticated client, or empty


@dataclass(frozen=True)
class Bounds:
    """The limits of one server."""

    connections: int = 64
    of_an_address: int = 64
    unauthenticated: int = 64  # of one kind at once
    unauthenticated_at_once: int = 256  # arrivals of a kind, of those that are not seen to be none meanwhile
    unauthenticated_a_minute: int = 120
    head_bytes: int = 16_384
    head_s: float = 10.0  # for a request's head, from its first byte or the connection's beginning, and a handshake
    body_s: float = 30.0  # for the rest of a request
    idle_s: float = 75.0  # between two requests
    stop_s: float = 3.0  # for requests that are being answered when the server stops


@contextmanager
def open_server(
    app: ASGIApp,
    listening: socket.socket,
    bounds: Bounds,
    *,
    secured: ssl.SSLContext | None = None,
    headers: Mapping[str, str] | None = None,
    kind_of: KindOf = nobody,
) -> Iterator[HttpServer]:
    """Serves while this lasts, in a thread; each answer has these headers. Raises `DeviceError`.

    `kind_of` says of an arrival with which others it is counted until `Connection.authenticate`, or nothing.
    """
    raise_descriptors()
    kernel_tells()  # found out while there are descriptors for it
    server = HttpServer(app, bounds, secured, headers or {}, kind_of)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    until = time.monotonic() + READY_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > until:
            raise DeviceError("the HTTP server did not start")
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(2 * bounds.stop_s)
        listening.close()


def raise_descriptors() -> None:
    """As many open files as the system lets this process have: the usual 1,024 are fewer than its ports can take."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class HttpServer(uvicorn.Server):
    """uvicorn, with limits of its own in front of it."""

    def __init__(
        self, app: ASGIApp, bounds: Bounds, secured: ssl.SSLContext | None, headers: Mapping[str, str], kind_of: KindOf
    ) -> None:
        config = uvicorn.Config(
            ErrorBoundary(app), http=Bounded, ws="none", loop="asyncio", lifespan="off", log_config=None,
            log_level="critical", access_log=False, server_header=False, proxy_headers=False,
            headers=list(headers.items()),
            h11_max_incomplete_event_size=bounds.head_bytes, timeout_keep_alive=int(bounds.idle_s),
            timeout_graceful_shutdown=int(bounds.stop_s),
        )  # fmt: skip
        super().__init__(config)
        self.bounds, self.secured, self.kind_of = bounds, secured, kind_of
        if secured is not None:  # asyncio keeps 256 KiB ready for each connection; a record of TLS has 16 at most
            asyncio.sslproto.SSLProtocol.max_size = RECORD_BYTES
        self.inside, self.unauthenticated = Counter[str](), Counter[str]()  # by address, by kind
        self._rates: dict[str, Rate] = {}  # kind → arrivals

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(lambda: Acceptor(self), sock=s, backlog=self.config.backlog) for s in sockets or []
        ]
        self.started = True

    def admit(self, address: str, connection: socket.socket) -> Connection | None:
        """Counts a connection in, if there is room for it."""
        if self.inside.total() >= self.bounds.connections or self.inside[address] >= self.bounds.of_an_address:
            return None
        kind = self.kind_of(address, connection)
        if kind and (
            self.unauthenticated[kind] >= self.bounds.unauthenticated or not self._rate(kind).take(1, time.monotonic())
        ):
            return None
        self.inside[address] += 1
        if kind:
            self.unauthenticated[kind] += 1
        return Connection(self, address, kind)

    def authenticate(self, connection: Connection) -> None:
        """It may ask: it is not counted any more, and neither is its arrival."""
        if connection.kind:
            self._rate(connection.kind).give(1)
            _take_from(self.unauthenticated, connection.kind)
            connection.kind = ""

    def leave(self, connection: Connection) -> None:
        """Counts a connection out that is over."""
        if connection.kind:
            _take_from(self.unauthenticated, connection.kind)
        _take_from(self.inside, connection.address)

    def _rate(self, kind: str) -> Rate:
        if kind not in self._rates:
            for oldest in list(self._rates)[: max(0, len(self._rates) - REMEMBERED)]:
                del self._rates[oldest]
            self._rates[kind] = Rate(self.bounds.unauthenticated_at_once, self.bounds.unauthenticated_a_minute)
        return self._rates[kind]


@dataclass
class Connection:
    """A connection, from its arrival to its end."""

    server: HttpServer
    address: str
    kind: str  # the unauthenticated with which it is counted; empty once it is authenticated

    def authenticate(self) -> None:
        """It has shown that it may ask: not counted any more."""
        self.server.authenticate(self)


def _take_from(counted: Counter[str], name: str) -> None:
    counted[name] -= 1
    if not counted[name]:
        del counted[name]


def connection_of(scope: Scope) -> Connection:
    """The connection that a request came over."""
    found: Connection = scope["state"][CONNECTION]
    return found


class Acceptor(asyncio.Protocol):
    """Where a connection arrives, before anything of it is read."""

    def __init__(self, server: HttpServer) -> None:
        self.server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        peer = transport.get_extra_info("peername")
        address = network_of(str(peer[0])) if isinstance(peer, tuple) else ""
        try:
            connection = self.server.admit(address, transport.get_extra_info("socket"))
        except Exception as error:  # noqa: BLE001  # left to the loop, it would stay open without any bound
            log.error("an arrival could not be judged: %s", type(error).__name__)
            connection = None
        if connection is None:
            transport.abort()
            return
        inside = Bounded(self.server.config, self.server.server_state, {CONNECTION: connection})
        inside.bounds, inside.let_go = self.server.bounds, partial(self.server.leave, connection)
        if self.server.secured is None:
            transport.set_protocol(inside)
            inside.connection_made(transport)
        else:
            transport.pause_reading()
            self._task = asyncio.get_running_loop().create_task(self._secured(transport, inside, self.server.secured))

    async def _secured(self, transport: asyncio.Transport, inside: Bounded, context: ssl.SSLContext) -> None:
        loop, seconds = asyncio.get_running_loop(), self.server.bounds.head_s
        try:
            upgraded = await loop.start_tls(
                transport, inside, context, server_side=True, ssl_handshake_timeout=seconds
            )  # fmt: skip
        except BaseException as error:
            transport.abort()
            inside.connection_lost(None)
            if not isinstance(error, OSError):  # of a handshake all are
                raise
            return
        if upgraded is not None:
            inside.connection_made(upgraded)


class Bounded(H11Protocol):
    """One connection, cut off when a part of a request takes longer than it may."""

    bounds: Bounds
    let_go: Callable[[], None]

    def __init__(self, config: uvicorn.Config, state: ServerState, app_state: dict[str, object]) -> None:
        super().__init__(config, state, app_state)
        self._early = bytearray()  # what came with the end of a handshake, before the connection was made
        self._lost = False
        self._timer: asyncio.TimerHandle | None = None
        self._awaited: object = None  # the part of a request that the timer is for

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if self._lost:
            return
        super().connection_made(transport)
        self.data_received(bytes(self._early))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport:
            self._forget()
            self._unset_keepalive_if_required()
            super().connection_lost(exc)
        if not self._lost:
            self._lost = True
            self.let_go()

    def data_received(self, data: bytes) -> None:
        if self.transport is None:
            self._early += data
            return
        if data:
            super().data_received(data)
        self._mind()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is not h11.SEND_BODY:
            self._forget()  # from here on the time between two requests counts

    def _mind(self) -> None:
        part = self.conn.their_state
        if part is self._awaited:
            return
        self._forget()
        seconds = {h11.IDLE: self.bounds.head_s, h11.SEND_BODY: self.bounds.body_s}.get(part)
        if seconds is not None and not self.transport.is_closing():
            self._awaited, self._timer = part, self.loop.call_later(seconds, self.transport.abort)

    def _forget(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._awaited = None


class ErrorBoundary:
    """An error inside is a line with its kind, without what was asked; the connection is closed."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            if not begun and connection_of(scope).kind:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001  # the server goes on with others
            log.error("a request could not be answered: %s", type(error).__name__)
            if not begun:
                closing = [(b"content-length", b"0"), (b"connection", b"close")]
                await send({"type": "http.response.start", "status": 500, "headers": closing})
                await send({"type": "http.response.body", "body": b""})
