"""The server for devices: TLS, the requests that a registered device makes, an invitation, and nothing else.

Whoever's key was not admitted is turned away by the head of a request: no body of theirs is read. There is no page, no
documentation, no way to start, list or stop a run, to register a key, or to take a task. Requests and bytes are
bounded for each device. Not covered: that a registered device answers with something wrong, which the intake refuses.
"""

from __future__ import annotations

import binascii
import json
import logging
import socket
import ssl
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from florilegium.client.agent.connection_limits import Rate, by_address
from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.http_server import Bounds, HttpServer, KindOf, connection_of, open_server
from florilegium.client.agent.invitation import JOIN
from florilegium.simulation.deployment.activity import Activity
from florilegium.simulation.deployment.link import Link

log = logging.getLogger(__name__)
PREFIX, ACTIVATE = "/v1/fleet/", "activate-node"
NOT_ADMITTED = "this key is not admitted"
BOUNDS = Bounds(connections=2048, of_an_address=1024, unauthenticated=128, body_s=120.0, idle_s=120.0)
STRANGERS_BYTES = 4096  # of the one request that a key which is not admitted may make: to be told so
Welcome = Callable[[str, str, str], bool]  # device, secret, public key
_Handler = Callable[[Any, Link], Any]
HANDLERS: dict[str, _Handler] = {
    ACTIVATE: lambda r, link: fleet_handlers.activate_node(r, link.state),
    "deactivate-node": lambda r, link: fleet_handlers.deactivate_node(r, link.state),
    "send-node-heartbeat": lambda r, link: fleet_handlers.send_node_heartbeat(r, link.state),
    "pull-messages": lambda r, link: fleet_handlers.pull_messages(r, link.state, link.state.object_store),
    "push-messages": lambda r, link: fleet_handlers.push_messages(r, link.state),
    "get-run": lambda r, link: fleet_handlers.get_run(r, link.state),
    "get-fab": lambda r, link: fleet_handlers.get_fab(r, link.state),
    "push-object": lambda r, link: fleet_handlers.push_object(r, link.state),
    "pull-object": lambda r, link: fleet_handlers.pull_object(r, link.state),
    "confirm-message-received": lambda r, link: fleet_handlers.confirm_message_received(
        r, link.state, link.state.object_store
    ),
}


class TurnedAwayError(Exception):
    """A request that is not answered: a status, and a word for whoever made it."""

    def __init__(self, status: int, told: str) -> None:
        super().__init__(told)
        self.status = status


@dataclass(frozen=True)
class Allowed:
    """What one device may ask: enough for its rounds several times over."""

    body_bytes: int = 2**20
    bytes_at_once: int = 4 * 2**20
    bytes_a_minute: int = 4 * 2**20
    requests_at_once: int = 1000
    requests_a_minute: int = 600

    @classmethod
    def of(cls, release_bytes: int) -> Allowed:
        """For releases of this size: in arrays of their own, with the messages around them."""
        whole = 2 * release_bytes + 2**16
        return cls(body_bytes=whole, bytes_at_once=4 * whole, bytes_a_minute=4 * whole)


class DeviceServer:
    """The requests of registered devices, an ASGI application."""

    def __init__(self, link: Link, allowed: Allowed, welcome: Welcome, activity: Activity | None = None) -> None:
        self.link, self.allowed, self.welcome, self.activity = link, allowed, welcome, activity or Activity()
        self._rates: dict[str, tuple[Rate, Rate]] = {}  # device → of requests, of bytes
        self._keys: dict[bytes, Any] = {}  # PEM → the key, read once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except TurnedAwayError as error:
            self.activity.turned_away[str(error)] += 1
            response = JSONResponse({"detail": str(error)}, error.status, headers={"connection": "close"})
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        """Of what is asked under the fleet's prefix, by its raw path: nothing in it is decoded or resolved."""
        path = request.scope["raw_path"].decode("latin-1")
        if path == JOIN and request.method == "POST":
            return await run_in_threadpool(self._welcomed, await self._body(request, ""))
        handler = HANDLERS.get(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else None
        if handler is None or request.method != "POST" or request.scope["query_string"]:
            raise TurnedAwayError(404, "Not Found")
        name, key = self._who(request)
        if not name and path != PREFIX + ACTIVATE:
            raise TurnedAwayError(401, NOT_ADMITTED)
        if name:
            connection_of(request.scope).authenticate()
            self.activity.heard[name] = time.time()
        body = await self._body(request, name)
        return await run_in_threadpool(self._handled, path, handler, body, name, key)

    def _who(self, request: Request) -> tuple[str, bytes]:
        """The device whose key has signed the time of this request, empty for a key that is not admitted."""
        heads = request.headers
        try:
            key = b64decode(heads[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
            signature = b64decode(heads[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
            stamp = heads[TIMESTAMP_HEADER]
            age = (now() - datetime.fromisoformat(stamp)).total_seconds()
            name = self.link.keys.get(key, "")
            if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
                raise TurnedAwayError(401, "the time of the request is not now")
            if name and not verify_signature(self._key(key), stamp.encode("ascii"), signature):
                raise TurnedAwayError(401, "the signature is not of this key")
        except (KeyError, ValueError, TypeError, binascii.Error):
            raise TurnedAwayError(401, "a device signs its requests") from None
        return name, key

    def _welcomed(self, body: bytes) -> Response:
        """Of a device that shows an invitation."""
        try:
            told = json.loads(body)
            fits = set(told) == {"device", "secret", "key"} and all(type(text) is str for text in told.values())
        except (ValueError, TypeError, RecursionError):
            fits = False
        if not fits or not self.welcome(told["device"], told["secret"], told["key"]):
            raise TurnedAwayError(401, "no such invitation")
        return Response()

    def _key(self, pem: bytes) -> Any:
        if pem not in self._keys:
            self._keys = {k: v for k, v in self._keys.items() if k in self.link.keys}
            self._keys[pem] = bytes_to_public_key(pem)
        return self._keys[pem]

    async def _body(self, request: Request, name: str) -> bytes:
        """Within what this device may send, at once and in a minute."""
        most = self.allowed.body_bytes if name else STRANGERS_BYTES
        if int(request.headers.get("content-length", "0")) > most:
            raise TurnedAwayError(413, f"a request has at most {most:,} bytes")
        found = bytearray()
        async for part in request.stream():
            found += part
            if len(found) > most:
                raise TurnedAwayError(413, f"a request has at most {most:,} bytes")
        if name:
            self._take(name, len(found))
        return bytes(found)

    def _take(self, name: str, size: int) -> None:
        if name not in self._rates:
            may = self.allowed
            self._rates[name] = (
                Rate(may.requests_at_once, may.requests_a_minute), Rate(may.bytes_at_once, may.bytes_a_minute)
            )  # fmt: skip
        requests, sizes = self._rates[name]
        clock = time.monotonic()
        if not requests.take(1, clock) or not sizes.take(size, clock):
            raise TurnedAwayError(503, "too much in a short time")

    def _handled(self, path: str, handler: _Handler, body: bytes, name: str, key: bytes) -> Response:
        """By Flower's own handler, for this device alone."""
        asked = PROTOBUF_REQUEST_TYPES["POST", path]()
        try:
            asked.ParseFromString(body)
            self._check_own(asked, name, key)
            answer = handler(asked, self.link)
        except FlowerError as error:
            if not name:
                self.activity.turned_away[NOT_ADMITTED] += 1
            known = API_ERROR_MAP[error.code]
            return JSONResponse(error.to_json(known.public_message), known.http_status_code)
        except (DecodeError, ValueError, IndexError, KeyError, TypeError):
            raise TurnedAwayError(400, "not a request of a device") from None
        return Response(answer.SerializeToString(), media_type=PROTOBUF_MEDIA_TYPE)

    def _check_own(self, asked: Any, name: str, key: bytes) -> None:
        """A device asks for itself, and answers for itself: raises `TurnedAwayError`."""
        if hasattr(asked, "public_key"):
            if asked.public_key != key:
                raise TurnedAwayError(401, "the request is for another key")
            return
        node = asked.node.node_id if hasattr(asked, "node") else asked.node_id
        answers = [message.metadata.src_node_id for message in getattr(asked, "messages_list", ())]
        if not {node, *answers} <= {self.link.nodes.get(name)} or len(answers) > 1:
            raise TurnedAwayError(401, "the request is for another device")


@contextmanager
def device_server(
    link: Link,
    host: str,
    port: int,
    certificate: Path,
    key: Path,
    allowed: Allowed,
    bounds: Bounds = BOUNDS,
    welcome: Welcome = lambda device, secret, key: False,
    kind_of: KindOf = by_address,
    activity: Activity | None = None,
) -> Iterator[HttpServer]:
    """Open on this address while this lasts; `welcome` says of whoever shows an invitation whether it is one.

    Raises `DeviceError` where it cannot be."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    app, listens = DeviceServer(link, allowed, welcome, activity), _listening(host, port)
    with open_server(app, listens, bounds, secured=context, kind_of=kind_of) as server:
        yield server


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio lets answers wait
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise DeviceError(f"{host}:{port} cannot be listened on: {error.strerror}; take another --port") from None
    return found
