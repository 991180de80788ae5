"""Limits on unauthenticated clients: connections that have not shown yet that they may ask, counted by kind.

On Linux a process on the same machine is known by its user, whom the kernel tells for a connection of this machine's
own. Not covered: other systems, where all users of the machine have one address and nobody is counted.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import count

SOCK_DIAG_BY_FAMILY, NETLINK_SOCK_DIAG = 20, 4
HEAD, ASKED, PORTS, UID = (struct.Struct(form) for form in ("=IHHII", "=BBBBI", "!HH", "=I"))
STATE_AT, UID_AT = 17, 80  # bytes into an answer: its head of 16, then an inet_diag_msg
ERROR, REFUSAL = 2, struct.Struct("=i")  # kind of an answer, and what follows its head
ESTABLISHED = 1
ANY_COOKIE = b"\xff" * 8
OWN = "127.0.0.1"
OTHERS = "other users"  # of this machine, all together: who may make namespaces has many numbers


@dataclass
class Rate:
    """So much in a minute, and so much at once: a bucket that fills again."""

    at_once: float
    a_minute: float
    left: float = field(init=False)
    last: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = self.at_once

    def take(self, amount: float, clock: float) -> bool:
        """Whether there was enough; then it is taken."""
        self.left = min(self.at_once, self.left + (clock - self.last) * self.a_minute / 60)
        self.last = clock
        if amount > self.left:
            return False
        self.left -= amount
        return True

    def give(self, amount: float) -> None:
        """Gives back some of what was taken."""
        self.left = min(self.at_once, self.left + amount)


def nobody(address: str, connection: socket.socket) -> str:
    """Counts nobody, for a server that others cannot reach."""
    return ""


def by_address(address: str, connection: socket.socket) -> str:
    """Whoever comes from elsewhere counts at first, with all others of that address.

    From this machine's own address a proxy comes, with everybody.
    """
    return "" if address == OWN else address


def by_user(address: str, connection: socket.socket) -> str:
    """A process of another user of this machine counts, and so does whoever has gone again."""
    return OTHERS if kernel_tells() and user_of(connection) != os.getuid() else ""


def network_of(address: str) -> str:
    """What one host can have as many of as it likes counts as one address: a /64 of IPv6, 127.0.0.0/8 here."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    found = getattr(found, "ipv4_mapped", None) or found
    if found.is_loopback:
        return OWN
    return str(found if found.version == 4 else ipaddress.ip_network((found, 64), strict=False))


def user_of(connection: socket.socket) -> int | None:
    """Who is at the other end of a connection of this machine's own over IPv4; None where it is not open there."""
    with suppress(OSError, ValueError):
        return _user_of(connection)
    return None


def _user_of(connection: socket.socket) -> int | None:
    """The kernel is asked for this one connection (sock_diag(7)); /proc/net/tcp has the same, and walks a table of all.

    Raises OSError where it cannot be asked, ValueError for another kind of connection.
    """
    (host, port), (own_host, own_port) = connection.getpeername(), connection.getsockname()
    ends = PORTS.pack(port, own_port) + b"".join(socket.inet_aton(h).ljust(16, b"\0") for h in (host, own_host))
    asked = ASKED.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 2**32 - 1) + ends + bytes(4) + ANY_COOKIE
    kind, answer = _told_by_kernel(asked)
    if kind == ERROR and (refused := -REFUSAL.unpack_from(answer, HEAD.size)[0]) != errno.ENOENT:
        raise OSError(refused, os.strerror(refused))
    open_there = len(answer) >= UID_AT + UID.size and answer[STATE_AT] == ESTABLISHED
    return int(UID.unpack_from(answer, UID_AT)[0]) if kind == SOCK_DIAG_BY_FAMILY and open_there else None


_turn, _numbers = threading.Lock(), count(1)  # of questions: threads have one socket


def _told_by_kernel(asked: bytes) -> tuple[int, bytes]:
    """The kind of an answer, and all of it."""
    with _turn:
        kernel, number = _kernel(), next(_numbers) % 2**32
        kernel.send(HEAD.pack(HEAD.size + len(asked), SOCK_DIAG_BY_FAMILY, 1, number, 0) + asked)
        while True:  # an answer that nobody took may be before it
            answer = kernel.recv(4096)
            _, kind, _, of, _ = HEAD.unpack_from(answer)
            if of == number:
                return kind, answer


@cache
def _kernel() -> socket.socket:
    """Kept open: where there are no descriptors left, the owner's own connections are still known by their user."""
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
    kernel.setblocking(False)  # the answer is there when `send` returns
    return kernel


def kernel_tells() -> bool:
    """Whether this system's kernel says whose a connection is; to be asked first while descriptors are left."""
    with suppress(OSError):
        return _tells()
    return False


@cache
def _tells() -> bool:
    """Raises OSError where it could not be found out this time, which is not remembered."""
    if not hasattr(socket, "AF_NETLINK"):
        return False
    _kernel()
    with socket.create_server(("127.0.0.1", 0)) as listens, socket.create_connection(listens.getsockname()) as own:
        return _user_of(own) == os.getuid()
