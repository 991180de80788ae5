"""Who is not meant to get in at the server's door does not: strangers, other devices, floods."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import httpx
import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from florilegium.client.agent.connection_limits import Rate, by_address
from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.http_server import Bounds, HttpServer, KindOf
from florilegium.client.agent.invitation import JOIN, accept, read_invitation, write_invitation
from florilegium.client.agent.terms import Terms, write_terms
from florilegium.privacy.common.errors import UserError
from florilegium.simulation.benchmarks.https_server import measure
from florilegium.simulation.benchmarks.separate_process import apart
from florilegium.simulation.deployment.certificates import CA, CERTIFICATE, KEY, make_certificates
from florilegium.simulation.deployment.https_server import BOUNDS, HANDLERS, PREFIX, Allowed, device_server
from florilegium.simulation.deployment.link import Link, pem_of
from florilegium.simulation.deployment.register import admit, admitted, expel, invite, welcome

BIN = Path(sys.executable).parent
SMALL = Allowed(body_bytes=10_000, bytes_at_once=30_000, bytes_a_minute=60, requests_at_once=30, requests_a_minute=60)
QUICK = Bounds(connections=20, of_an_address=20, head_s=1.0, body_s=1.0, idle_s=2.0, stop_s=1.0)


@dataclass
class Device:
    """One that knows how Flower's SuperNodes sign."""

    key: ec.EllipticCurvePrivateKey
    address: str
    authority: Path
    node: int = 0

    @property
    def pem(self) -> bytes:
        return public_key_to_bytes(self.key.public_key())

    def heads(self, age: timedelta = timedelta(), signer: ec.EllipticCurvePrivateKey | None = None) -> dict[str, str]:
        stamp = (now() - age).isoformat()
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.pem).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(signer or self.key, stamp.encode())).decode(),
            TIMESTAMP_HEADER: stamp,
            "content-type": "application/x-protobuf",
        }

    def client(self) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.authority))
        return httpx.Client(base_url=f"https://{self.address}", verify=context, timeout=30, trust_env=False)

    def post(self, name: str, body: bytes, **heads: str) -> httpx.Response:
        with self.client() as client:
            return client.post(f"{PREFIX}{name}", content=body, headers={**self.heads(), **heads})

    def activate(self) -> httpx.Response:
        return self.post(
            "activate-node", ActivateNodeRequest(public_key=self.pem, heartbeat_interval=30).SerializeToString()
        )


@dataclass
class Served:
    link: Link
    door: HttpServer
    address: str
    folder: Path
    alice: Device
    mallory: Device  # whose key nobody has admitted

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("server")
    make_certificates(made, ["127.0.0.1"])
    return made


def served(folder: Path, allowed: Allowed, bounds: Bounds, kind_of: KindOf = by_address) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    link, address = Link(), f"127.0.0.1:{port}"
    alice, mallory = (Device(ec.generate_private_key(ec.SECP384R1()), address, folder / CA) for _ in range(2))
    link.set_admitted({"alice": alice.pem})
    alice.node = link.nodes["alice"]
    files = folder / CERTIFICATE, folder / KEY
    with device_server(link, "127.0.0.1", port, *files, allowed, bounds, kind_of=kind_of) as door:
        yield Served(link, door, address, folder, alice, mallory)


@pytest.fixture
def server(folder: Path) -> Iterator[Served]:
    yield from served(folder, Allowed(), BOUNDS)


@pytest.fixture
def narrow(folder: Path) -> Iterator[Served]:
    yield from served(folder, SMALL, QUICK)


@pytest.fixture
def reserved(folder: Path) -> Iterator[Served]:
    """Where all that come are unauthenticated, of whom few are borne."""
    few = Bounds(unauthenticated=2, unauthenticated_at_once=4, unauthenticated_a_minute=0)
    yield from served(folder, Allowed(), few, lambda address, connection: address)


def raw(server: Served) -> ssl.SSLSocket:
    """A connection on which anything may be written."""
    context = ssl.create_default_context(cafile=str(server.folder / CA))
    return context.wrap_socket(
        socket.create_connection(("127.0.0.1", server.port), timeout=20), server_hostname="127.0.0.1"
    )


def said(connection: socket.socket) -> bytes:
    """All that is answered until the other side ends it."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except (ConnectionError, ssl.SSLError):
        pass
    return found


# -- strangers --------------------------------------------------------------------------------------------------------


def test_nothing_but_a_devices_requests_is_there(server: Served) -> None:
    """Every path that Flower's SuperLink has, as it is and in disguise: 404, whoever asks."""
    from flwr.superlink.main import create_app

    paths = {*create_app().openapi()["paths"], "/docs", "/openapi.json", "/"}
    closed = {path for path in paths if path.removeprefix(PREFIX) not in HANDLERS}
    assert {"/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/register-node"} <= closed
    disguised = [
        "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet//control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run", "//v1/control/start-run", "/v1/fleet/x/../../control/start-run",
        "/v1/fleet/pull-messages%00", "/v1/fleet/pull-messages/", "/V1/fleet/pull-messages",
        "/v1/fleet/pull-messages?x=1", "/v1/fleet/pull%2dmessages",
    ]  # fmt: skip
    for path in (*sorted(closed), *disguised):
        with raw(server) as connection:
            heads = "".join(f"{k}: {v}\r\n" for k, v in server.alice.heads().items())
            ask = f"POST {path} HTTP/1.1\r\nhost: x\r\n{heads}content-length: 0\r\n\r\n"
            connection.sendall(ask.encode())
            assert said(connection).startswith(b"HTTP/1.1 404 "), path
    with server.alice.client() as client:
        for method in ("GET", "PUT", "OPTIONS", "TRACE", "DELETE"):
            assert client.request(method, f"{PREFIX}pull-messages", headers=server.alice.heads()).status_code == 404


def test_who_is_not_admitted_is_told_so_and_nothing_else(server: Served) -> None:
    told = server.mallory.activate()
    assert told.status_code >= 400 and "Failed to activate" in told.text
    ask = PullMessagesRequest(node=Node(node_id=server.alice.node)).SerializeToString()
    assert server.mallory.post("pull-messages", ask).status_code == 401
    with server.mallory.client() as client:
        assert client.post(f"{PREFIX}pull-messages", content=ask).status_code == 401
        stolen = {
            **server.alice.heads(),
            FLEET_HTTP_SIGNATURE_HEADER: server.mallory.heads()[FLEET_HTTP_SIGNATURE_HEADER],
        }
        assert client.post(f"{PREFIX}pull-messages", content=ask, headers=stolen).status_code == 401
        for age in (timedelta(minutes=10), timedelta(minutes=-10)):
            assert (
                client.post(f"{PREFIX}pull-messages", content=ask, headers=server.alice.heads(age)).status_code == 401
            )
    assert server.link.online() == {} and set(server.link.keys.values()) == {"alice"}


def test_a_device_asks_and_answers_for_itself_alone(server: Served) -> None:
    bob = replace(server.mallory)
    server.link.set_admitted({"alice": server.alice.pem, "bob": bob.pem})
    assert server.alice.activate().status_code == 200 and bob.activate().status_code == 200
    assert set(server.link.online()) == {"alice", "bob"}
    own, others = Node(node_id=server.link.nodes["bob"]), Node(node_id=server.alice.node)
    assert bob.post("pull-messages", PullMessagesRequest(node=own).SerializeToString()).status_code == 200
    assert bob.post("pull-messages", PullMessagesRequest(node=others).SerializeToString()).status_code == 401
    beat = SendNodeHeartbeatRequest(node=others, heartbeat_interval=30).SerializeToString()
    assert bob.post("send-node-heartbeat", beat).status_code == 401
    theirs = Message(
        metadata=Metadata(run_id=server.link.run_id, src_node_id=server.alice.node, reply_to_message_id="x")
    )
    asked = PushMessagesRequest(node=own, messages_list=[theirs], message_object_trees=[ObjectTree()])
    assert bob.post("push-messages", asked.SerializeToString()).status_code == 401
    stolen = ActivateNodeRequest(public_key=server.alice.pem, heartbeat_interval=30).SerializeToString()
    assert bob.post("activate-node", stolen).status_code == 401


def test_who_is_expelled_is_out_at_once_and_may_be_let_in_again(server: Served) -> None:
    assert server.alice.activate().status_code == 200
    server.link.set_admitted({})
    assert server.link.online() == {} and server.alice.activate().status_code >= 400
    server.link.set_admitted({"alice": server.alice.pem})
    assert server.alice.activate().status_code == 200 and set(server.link.online()) == {"alice"}


@pytest.mark.parametrize("body", [b"\xff" * 100, b"", bytes(range(256)) * 2], ids=["ones", "nothing", "bytes"])
@pytest.mark.parametrize("name", sorted(HANDLERS))
def test_what_is_no_message_is_refused(server: Served, name: str, body: bytes) -> None:
    assert 400 <= server.alice.post(name, body).status_code < 500
    assert server.alice.activate().status_code == 200  # and the door is still there


def test_large_bodies_are_not_read(narrow: Served) -> None:
    """Of a stranger not one byte; of a device so many as a release has, in one request and in a minute."""
    for name, size in (("push-messages", 40_000_000), ("activate-node", 40_000_000)):
        with suppress(httpx.TransportError):  # cut off while it was sending
            assert narrow.mallory.post(name, b"x" * size).status_code in (401, 413)
    assert narrow.mallory.post("activate-node", b"x" * 5000).status_code == 413
    with raw(narrow) as connection:  # a length that is only said
        heads = "".join(f"{k}: {v}\r\n" for k, v in narrow.alice.heads().items())
        connection.sendall(
            f"POST {PREFIX}push-object HTTP/1.1\r\nhost: x\r\n{heads}content-length: 400000000\r\n\r\n".encode()
        )
        assert said(connection).startswith(b"HTTP/1.1 413 ")
    with raw(narrow) as connection:  # and one that is not said at all
        connection.sendall(
            f"POST {PREFIX}push-object HTTP/1.1\r\nhost: x\r\n{heads}transfer-encoding: chunked\r\n\r\n".encode()
        )
        sent = 0
        try:
            while sent < 50_000_000:
                sent += connection.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except (ConnectionError, ssl.SSLError, TimeoutError):
            pass
        assert sent < 20_000_000
    codes = [narrow.alice.post("push-object", b"\xff" * 9_000).status_code for _ in range(4)]
    assert codes == [400, 400, 400, 503]


def test_a_device_that_asks_too_much_is_told_to_wait(narrow: Served) -> None:
    ask = PullMessagesRequest(node=Node(node_id=narrow.alice.node)).SerializeToString()
    with narrow.alice.client() as client:
        codes = [
            client.post(f"{PREFIX}pull-messages", content=ask, headers=narrow.alice.heads()).status_code
            for _ in range(40)
        ]
    assert codes[:30] == [200] * 30 and 503 in codes[30:]


def test_a_rate_fills_again() -> None:
    rate = Rate(at_once=10, a_minute=60)
    begun = rate.last
    assert rate.take(10, begun) and not rate.take(1, begun) and rate.take(1, begun + 1) and not rate.take(1, begun + 1)
    assert not rate.take(11, begun + 1000) and rate.take(10, begun + 1000)


# -- floods -----------------------------------------------------------------------------------------------------------


def test_who_says_nothing_is_cut_off_and_the_newest_is_refused(narrow: Served) -> None:
    """Connections without a handshake, without a head, with half a head, with half a body: none lasts."""
    idle = [socket.create_connection(("127.0.0.1", narrow.port)) for _ in range(10)]
    silent = [raw(narrow) for _ in range(10)]
    for number, connection in enumerate(silent):
        connection.sendall((b"", b"POST /v1/fleet/pu")[number % 2])
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=5) as newest:
        assert said(newest) == b""
    assert narrow.door.inside.total() == 20
    for connection in (*idle, *silent):
        connection.settimeout(10)
        assert said(connection) == b""
        connection.close()
    assert narrow.alice.activate().status_code == 200
    with raw(narrow) as connection:
        heads = "".join(f"{k}: {v}\r\n" for k, v in narrow.alice.heads().items())
        connection.sendall(
            f"POST {PREFIX}push-object HTTP/1.1\r\nhost: x\r\n{heads}content-length: 100\r\n\r\nabc".encode()
        )
        assert said(connection) == b""
    until = time.monotonic() + 10
    while narrow.door.inside and time.monotonic() < until:
        time.sleep(0.05)
    assert not narrow.door.inside


def test_who_has_shown_no_key_has_few_places_and_one_request_each(reserved: Served) -> None:
    """A device's connections do not count with them, and it keeps the one that it has while they are all taken."""
    ask = PullMessagesRequest(node=Node(node_id=reserved.alice.node)).SerializeToString()
    with reserved.alice.client() as device:

        def asked() -> httpx.Response:
            return device.post(f"{PREFIX}pull-messages", content=ask, headers=reserved.alice.heads())

        assert reserved.alice.activate().status_code == 200 and asked().status_code == 200
        assert [reserved.alice.post("pull-messages", ask).status_code for _ in range(6)] == [200] * 6
        silent = [raw(reserved) for _ in range(2)]
        with pytest.raises(httpx.TransportError):
            reserved.mallory.activate()
        assert asked().status_code == 200 and "connection" not in asked().headers
        for connection in silent:
            connection.close()
        until = time.monotonic() + 10
        while reserved.door.unauthenticated and time.monotonic() < until:
            time.sleep(0.01)
        assert [reserved.mallory.activate().headers["connection"] for _ in range(2)] == ["close"] * 2
        with pytest.raises(httpx.TransportError):  # four arrivals
            reserved.mallory.activate()
        assert asked().status_code == 200


def test_a_head_without_end_is_ended(narrow: Served) -> None:
    with raw(narrow) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nx: ")
        sent = 0
        try:
            while sent < 50_000_000:
                sent += connection.send(b"a" * 65536)
        except (ConnectionError, ssl.SSLError):
            pass
        assert sent < 20_000_000
    assert narrow.alice.activate().status_code == 200


def test_garbage_writes_no_traceback(narrow: Served, capfd: pytest.CaptureFixture[str]) -> None:
    upgrade = (
        b"GET /v1/fleet/x HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    for garbage in (b"\x00" * 100 + b"\r\n\r\n", upgrade, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        with raw(narrow) as connection:
            connection.sendall(garbage)
            assert said(connection).startswith(b"HTTP/1.1 4")
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=5) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")  # no TLS at all
        assert not said(plain).startswith(b"HTTP")
    with pytest.raises(ssl.SSLError):
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(narrow.folder / CA)
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.wrap_socket(socket.create_connection(("127.0.0.1", narrow.port)), server_hostname="127.0.0.1")
    assert "Traceback" not in capfd.readouterr().err


def test_a_benchmark_of_what_does_not_begin_is_told_and_does_not_wait() -> None:
    with pytest.raises(UserError, match="ended before it began, exit code 1"), apart(time.sleep):
        pass  # a pipe is no number of seconds


@pytest.mark.slow
def test_a_thousand_devices_are_borne() -> None:
    """Registered ones that poll, all at once: none is lost, and each costs the door little memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    found = measure(1000, 9.0, port, print)
    assert found.failed == 0 and found.devices == 1000
    assert found.memory_largest_mb - found.memory_before_mb < 200


# -- who may join -----------------------------------------------------------------------------------------------------


def test_a_name_is_bound_to_its_key(tmp_path: Path) -> None:
    keys = []
    for number in range(2):
        public = ec.generate_private_key(ec.SECP384R1()).public_key()

        keys.append(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
        (tmp_path / f"{number}.pub").write_text(keys[-1])
    admit(tmp_path, "alice", keys[0])
    admit(tmp_path, "alice", str(tmp_path / "0.pub"))  # the same once more
    with pytest.raises(DeviceError, match="another key already"):
        admit(tmp_path, "alice", keys[1])
    with pytest.raises(DeviceError, match="alice's already"):
        admit(tmp_path, "bob", keys[0])
    for name in ("", "../alice", "a b", "x" * 65, "<script>", "ä", "a\n"):
        with pytest.raises(DeviceError, match="no name of a device"):
            admit(tmp_path, name, keys[1])
    for key in ("nothing.pub", "ssh-ed25519 AAAA", "ecdsa-sha2-nistp384 AAAA"):
        with pytest.raises(DeviceError):
            admit(tmp_path, "bob", key)
    (tmp_path / "nodes" / "broken.pub").write_text("not a key")
    assert admitted(tmp_path) == {"alice": pem_of(keys[0])}
    expel(tmp_path, "alice")
    with pytest.raises(DeviceError, match="not admitted"):
        expel(tmp_path, "alice")
    admit(tmp_path, "bob", keys[0])
    assert list(admitted(tmp_path)) == ["bob"]


def public_of(device: Device) -> str:
    return device.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def test_an_invitation_works_once(tmp_path: Path) -> None:
    """For the first who shows it, under the name that is in it; whatever else is shown lets nobody in."""
    make_certificates(tmp_path, ["127.0.0.1"])
    write_terms(tmp_path / "terms.toml", Terms(name="orchard", operator="0" * 64))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    void = invite(tmp_path, "alice", f"127.0.0.1:{port}")
    made = invite(tmp_path, "alice", f"127.0.0.1:{port}")
    write_invitation(tmp_path / "alice.invitation", made)
    assert (tmp_path / "alice.invitation").stat().st_mode & 0o777 == 0o600
    with pytest.raises(DeviceError, match="there already"):
        write_invitation(tmp_path / "alice.invitation", made)
    read = read_invitation(tmp_path / "alice.invitation")
    assert read == made and read_invitation(tmp_path / "terms.toml") is None and made.secret != void.secret
    assert made.secret not in (tmp_path / "invitations" / "alice").read_text()
    alice, mallory = (Device(ec.generate_private_key(ec.SECP384R1()), made.server, tmp_path / CA) for _ in range(2))
    with device_server(Link(), "127.0.0.1", port, tmp_path / CERTIFICATE, tmp_path / KEY, Allowed(),
                    welcome=partial(welcome, tmp_path)):  # fmt: skip
        for other in (
            void,
            made.model_copy(update={"secret": "0" * 64}),
            made.model_copy(update={"device": "bob"}),
            made.model_copy(update={"device": "../invitations/alice"}),
        ):
            with pytest.raises(DeviceError, match="does not take this invitation"):
                accept(other, public_of(mallory))
        with pytest.raises(DeviceError, match="does not take"):
            accept(made, "/etc/passwd")
        with alice.client() as client:
            for body in (b"", b"[]", b"{}", b"[" * 3000, b'{"device": 1, "secret": 2, "key": 3}', b"\xff"):
                assert client.post(JOIN, content=body).status_code == 401
            assert client.post(JOIN, content=b"x" * 5000).status_code == 413
            assert client.get(JOIN).status_code == 404
        assert admitted(tmp_path) == {}
        accept(made, public_of(alice))
        assert admitted(tmp_path) == {"alice": alice.pem}
        for device in (mallory, alice):
            with pytest.raises(DeviceError, match="does not take"):
                accept(made, public_of(device))
    with pytest.raises(DeviceError, match="was not reached"):
        accept(made, public_of(alice))
    for name, server in (("alice", "x:1"), ("a b", "x:1"), ("bob", "nowhere")):
        with pytest.raises(DeviceError):
            invite(tmp_path, name, server)
    assert admitted(tmp_path) == {"alice": alice.pem}


# -- Flower's own commands, in a stranger's hands ---------------------------------------------------------------------

APP = """[project]
name = "evil"
version = "1"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "mallory"
[tool.flwr.app.components]
serverapp = "evil:server"
clientapp = "evil:client"
"""
EVIL = """from pathlib import Path
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
server, client = ServerApp(), ClientApp()
@server.main()
def main(grid, context):
    Path({mark!r}).write_text("run")
"""


@pytest.mark.slow
def test_a_strangers_commands_reach_nothing(server: Served, tmp_path: Path) -> None:
    """With the authority's certificate alone, which all participants have: nothing runs, is shown or registered."""
    mark, home, app = tmp_path / "mark", tmp_path / "flower", tmp_path / "app"
    home.mkdir()
    app.mkdir()
    (app / "pyproject.toml").write_text(APP)
    (app / "evil.py").write_text(EVIL.format(mark=str(mark)))
    tree = {
        "superlink": {"default": "x", "x": {"address": server.address, "root-certificates": str(server.folder / CA)}}
    }
    (home / "config.toml").write_text(tomli_w.dumps(tree))
    public = tmp_path / "own.pub"

    public.write_bytes(server.mallory.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    environment = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    for command in (
        ["run", str(app), "x"],
        ["ls", "x"],
        ["stop", "1", "x"],
        ["supernode", "register", str(public), "x"],
    ):
        done = subprocess.run(
            [str(BIN / "flwr"), *command], capture_output=True, text=True, env=environment, cwd=app, timeout=120
        )
        assert done.returncode != 0, done.stdout
    assert not mark.exists() and set(server.link.keys.values()) == {"alice"}
    assert [run.run_id for run in server.link.state.get_run_info()] == [server.link.run_id]
