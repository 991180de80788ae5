"""Limits on the unauthenticated: few places for those of a kind, so many in a minute, and one request each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from florilegium.client.agent import connection_limits
from florilegium.client.agent.connection_limits import (
    OTHERS,
    Rate,
    by_address,
    by_user,
    kernel_tells,
    network_of,
    user_of,
)
from florilegium.client.agent.http_server import REMEMBERED, Bounds, HttpServer, connection_of, open_server
from florilegium.client.agent.supernode_process import OwnersAlone, close_to_others

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel that tells is Linux'")
AS_ROOT = pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="needs another user's process")
CROWD = """
import encodings.idna, os, socket, sys
os.setgid(65534)
os.setuid(65534)
port, count = map(int, sys.argv[1:])
held = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
for each in held:
    each.settimeout(0.2)
    try:
        each.sendall(b"GET / HTTP/1.1\\r\\nhost: x\\r\\n")  # a head that does not end
        refused = each.recv(1) == b""
    except TimeoutError:
        refused = False
    except ConnectionError:
        refused = True
    print("refused" if refused else "held", flush=True)
sys.stdin.read()
"""


HASTE = """
import encodings.idna, os, socket, sys
os.setgid(65534)
os.setuid(65534)
held = []
for number in range(100_000):
    try:
        held.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=2))
        held[-1].sendall(b"GET / HTTP/1.1\\r\\nhost: x\\r\\n")
    except OSError:
        pass
    if number == 300:
        print("begun", flush=True)
    while len(held) > 200:
        held.pop(0).close()
"""


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says yes to everybody; who has a key is not counted."""
    if (b"key", b"mine") in scope["headers"]:
        connection_of(scope).authenticate()
    await told(scope, receive, send)


def everybody(address: str, connection: socket.socket) -> str:
    return address


async def told(scope: Scope, receive: Receive, send: Send) -> None:
    """As `app`, at a door that counts nobody."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@contextmanager
def opened(kind_of: object, **bounds: float) -> Iterator[tuple[HttpServer, str, int]]:
    listens = socket.socket()
    listens.bind(("127.0.0.1", 0))
    port = int(listens.getsockname()[1])
    with open_server(app, listens, Bounds(**bounds), kind_of=kind_of) as door:  # type: ignore[arg-type]
        yield door, f"http://127.0.0.1:{port}/", port


def until(true: object) -> bool:
    end = time.monotonic() + 10
    while not true():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def refused(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            return connection.recv(1) == b""
        except ConnectionError:
            return True


def test_the_unauthenticated_of_an_address_have_few_places_and_who_shows_a_key_has_more() -> None:
    with opened(everybody, unauthenticated=3) as (door, url, port), httpx.Client() as known:
        assert known.get(url, headers={"key": "mine"}).status_code == 200 and not door.unauthenticated
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        assert until(lambda: door.unauthenticated["127.0.0.1"] == 3)
        assert refused(port)
        assert known.get(url).status_code == 200  # over the connection that it has
        for each in silent:
            each.close()
        assert until(lambda: not door.unauthenticated) and not refused(port)
        assert until(lambda: not door.unauthenticated) and door.inside == {"127.0.0.1": 1}


def test_an_unauthenticated_client_has_one_request_a_connection_and_so_many_in_a_minute() -> None:
    anew = httpx.Limits(max_keepalive_connections=0)  # a connection for each request
    with (
        opened(everybody, unauthenticated_at_once=5, unauthenticated_a_minute=1) as (_, url, port),
        httpx.Client(limits=anew) as client,
    ):
        for _ in range(20):  # who shows a key takes nothing from the others
            assert "connection" not in client.get(url, headers={"key": "mine"}).headers
        answers = [client.get(url).headers["connection"] for _ in range(5)]
        assert answers == ["close"] * 5 and refused(port)


def test_what_is_remembered_of_arrivals_is_bounded() -> None:
    door = HttpServer(app, Bounds(), None, {}, everybody)
    for k in range(REMEMBERED + 50):
        door._rate(str(k)).take(1, 0.0)
    assert len(door._rates) == REMEMBERED + 1 and str(REMEMBERED + 49) in door._rates


def test_what_was_taken_is_given_back_at_most() -> None:
    rate = Rate(at_once=2, a_minute=0)
    assert rate.take(2, rate.last) and not rate.take(1, rate.last)
    rate.give(1)
    assert rate.take(1, rate.last) and not rate.take(1, rate.last)
    rate.give(100)
    assert not rate.take(3, rate.last) and rate.take(2, rate.last)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::7", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_a_host_of_ipv6_has_one_network(address: str, network: str) -> None:
    assert network_of(address) == network
    with socket.socket() as any_:
        assert by_address(network, any_) == network


def test_a_proxy_of_this_machine_is_not_counted() -> None:
    with socket.socket() as any_:
        for own in ("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.2"):  # as many as it likes: they count as one
            assert network_of(own) == "127.0.0.1" and by_address(network_of(own), any_) == ""


# -- users of one machine ---------------------------------------------------------------------------------------------


@LINUX
def test_the_kernel_tells_whose_a_connection_is() -> None:
    listens = socket.create_server(("127.0.0.1", 0))
    own = socket.create_connection(listens.getsockname())
    with listens, own, listens.accept()[0] as here:
        assert kernel_tells() and user_of(here) == user_of(own) == os.getuid() and by_user("127.0.0.1", here) == ""
        own.close()  # from now on it is nobody's: the kernel would say root's
        assert user_of(here) is None and by_user("127.0.0.1", here) == OTHERS


@contextmanager
def no_descriptors() -> Iterator[None]:
    """All that this process may have are taken while this lasts, but for those that it has."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 1
    taken = list[int]()
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@LINUX
def test_the_owner_is_known_where_no_descriptors_are_left() -> None:
    assert kernel_tells()
    with (
        socket.create_server(("127.0.0.1", 0)) as listens,
        socket.create_connection(listens.getsockname()) as own,
        no_descriptors(),
    ):
        with pytest.raises(OSError):  # so it is
            socket.socket()
        assert by_user("127.0.0.1", own) == ""


@LINUX
def test_what_could_not_be_found_out_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    connection_limits._tells.cache_clear()
    with no_descriptors():
        assert not kernel_tells()
    assert kernel_tells()


@LINUX
def test_an_answer_that_nobody_took_is_not_the_next_ones() -> None:
    """Of a connection that is not open, asked for before one that is."""
    nobodys = (
        connection_limits.ASKED.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 2**32 - 1)
        + bytes(40)
        + connection_limits.ANY_COOKIE
    )
    head = connection_limits.HEAD.pack(
        connection_limits.HEAD.size + len(nobodys), connection_limits.SOCK_DIAG_BY_FAMILY, 1, 0, 0
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as listens,
        socket.create_connection(listens.getsockname()) as own,
    ):
        connection_limits._kernel().send(head + nobodys)
        assert user_of(own) == os.getuid()


def test_an_arrival_that_cannot_be_judged_is_cut_off() -> None:
    def broken(address: str, connection: socket.socket) -> str:
        raise OSError("no descriptors")

    with opened(broken) as (door, _, port):
        assert refused(port) and not door.inside


def test_a_server_of_flowers_is_its_owners_or_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is set up; where that is not had, nothing is served."""
    for kind, method in ((uvicorn.Config, "__init__"), (uvicorn.Server, "startup")):
        monkeypatch.setattr(kind, method, getattr(kind, method))  # put back afterwards
    close_to_others()
    config = uvicorn.Config(told, http="h11", ws="auto", port=0, lifespan="off", log_config=None)
    config.load()
    assert config.http_protocol_class is OwnersAlone and config.ws_protocol_class is None
    config.http_protocol_class = H11Protocol
    with pytest.raises(SystemExit, match="open to others"):
        uvicorn.Server(config).run()


@AS_ROOT
def test_other_users_of_the_machine_keep_the_owner_from_nothing() -> None:
    """Forty connections of somebody else's, four of which stay: the owner's browser gets in all the while."""
    with opened(by_user, connections=12, of_an_address=12, unauthenticated=4) as (door, url, port):
        crowd = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CROWD, str(port), "40"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert crowd.stdout
            said = [crowd.stdout.readline().strip() for _ in range(40)]
            assert said.count("held") == 4 == door.unauthenticated[OTHERS]
            with httpx.Client() as owner:
                assert ["connection" in owner.get(url).headers for _ in range(3)] == [False] * 3  # not counted
            mine = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
            assert until(lambda: door.inside["127.0.0.1"] == 12) and refused(port)  # of one's own are so many
            for each in mine:
                each.close()
        finally:
            crowd.communicate("")


@AS_ROOT
def test_a_supernodes_port_is_its_owners_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listens:
        port = int(listens.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(told, http=OwnersAlone, ws="none", lifespan="off", log_level="critical"))
        thread = Thread(target=server.run, args=([listens],))
        thread.start()
        try:
            assert until(lambda: server.started)
            crowd = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", CROWD, str(port), "5"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert crowd.communicate("")[0].split() == ["refused"] * 5
            assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        finally:
            server.should_exit = True
            thread.join()


@AS_ROOT
def test_whoever_comes_and_goes_keeps_the_owner_from_nothing() -> None:
    """Connections that are closed before they are looked at are nobody's, and do not take the owner's places."""
    anew = httpx.Limits(max_keepalive_connections=0)
    with opened(by_user, connections=32, of_an_address=32, unauthenticated=4, unauthenticated_a_minute=10_000) as (
        _,
        url,
        port,
    ):
        hasty = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", HASTE, str(port)], stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        try:
            assert hasty.stdout and hasty.stdout.readline() == "begun\n"
            with httpx.Client(limits=anew, timeout=30) as owner:
                assert [owner.get(url).status_code for _ in range(4)] == [200] * 4
        finally:
            hasty.kill()
            hasty.wait()
