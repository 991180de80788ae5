"""`florilegium bench secure`: what secure aggregation costs a device and its server, by how many devices there are.

One round of the protocol, without learning: real keys, parts, masks and signatures of all devices in this process, one
in ten lost after its parts had come. What is timed of a device is all that it computes in the round; its own signatures
are checked anew on each device, as real ones do. Beside it are the plain sum of the same numbers, and Flower's SecAgg+
with as many neighbours (`simulation.benchmarks.secure_flower`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from secrets import token_bytes
from statistics import median
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Group

from florilegium.client.terminal import Figures
from florilegium.privacy.secure_aggregation import keys
from florilegium.privacy.secure_aggregation.adverts import certified
from florilegium.privacy.secure_aggregation.keys import identity_key
from florilegium.privacy.secure_aggregation.neighbours import SumLimits
from florilegium.privacy.secure_aggregation.rounded_noise import SumCode, sum_code
from florilegium.privacy.secure_aggregation.session import Scene, Session
from florilegium.privacy.secure_aggregation.wire import reply_bytes, told_bytes
from florilegium.server.secure_sum import SecureSum
from florilegium.simulation.benchmarks.engine import machine
from florilegium.simulation.benchmarks.secure_flower import FlowerRound, flower_round

NOISE = 1.0  # in clipping norms, of the sum
LOST = 10  # one in so many


@dataclass(frozen=True)
class Measured:
    """One round with so many devices."""

    devices: int
    neighbours: int
    bits: int
    up_bytes: int  # of one device: all that it says
    beside_bytes: int  # of these, beside its masked numbers
    down_bytes: int  # of one device, beside the shared adapter
    device_ms: float  # median over those that came through
    server_ms: float
    plain_ms: float  # the server's, of a sum of numbers that nothing hides
    flower: FlowerRound


@dataclass(frozen=True)
class Outcome:
    """A row a number of devices, all with rows of the same width."""

    width: int
    rows: list[Measured]


def measure(devices: Sequence[int], width: int, tell: Callable[[str], object]) -> Outcome:
    """Rounds of so many devices with rows of `width` numbers."""
    found = list[Measured]()
    for count in devices:
        tell(f"{count:,} devices")
        found.append(_measured(count, width))
    return Outcome(width, found)


def _measured(count: int, width: int) -> Measured:
    lost = {f"device-{k:05d}" for k in range(0, count - count % LOST, LOST)}
    survivors = count - len(lost)
    code = sum_code(width, count, 1.0, NOISE / survivors**0.5)
    limits, registrar = SumLimits(count, survivors), identity_key(token_bytes(32))
    server = SecureSum(("bench", 1), width, code.bits, limits, registrar.public_key().public_bytes_raw())
    sessions, spent = _sessions(count, limits, registrar), dict[str, float]()
    began = time.perf_counter()
    numbers = _play(server, sessions, lost, code, spent)
    total = server.total()
    whole = time.perf_counter() - began
    began = time.perf_counter()
    plain = np.zeros(width, np.int64)
    for row in numbers.values():
        plain += row
    plain_s = time.perf_counter() - began
    if not np.array_equal(total, plain & (2**code.bits - 1)):
        raise AssertionError("the masked sum is not the sum")
    holders = len(server.adverts_for(next(iter(sessions))))
    return Measured(
        count, holders - 1, code.bits, code.size_bytes + reply_bytes(holders), reply_bytes(holders),
        told_bytes(holders), 1000 * median(spent[n] for n in server.came),
        1000 * (whole - sum(spent.values())), 1000 * plain_s, _flower(count, width, len(lost), holders),
    )  # fmt: skip


def _flower(count: int, width: int, lost: int, holders: int) -> FlowerRound:
    rng = np.random.default_rng(0)
    rows = {node: (rng.normal(size=width) / width).astype(np.float32) for node in range(1, count + 1)}
    return flower_round(rows, set(range(1, lost + 1)), holders, holders // 2 + 1)


def _sessions(count: int, limits: SumLimits, registrar: Ed25519PrivateKey) -> dict[str, Session]:
    known = registrar.public_key().public_bytes_raw()
    found = {}
    for k in range(count):
        name, own = f"device-{k:05d}", identity_key(token_bytes(32))
        certificate = certified(registrar, "bench", name, own.public_key().public_bytes_raw())
        found[name] = Session(Scene("bench", 1, name, known, limits), token_bytes(32), own, certificate)
    return found


def _play(
    server: SecureSum, sessions: dict[str, Session], lost: set[str], code: SumCode, spent: dict[str, float]
) -> dict[str, np.ndarray]:
    """All steps; returns the numbers of those who came, and notes the seconds of each device."""
    rng, numbers = np.random.default_rng(0), dict[str, np.ndarray]()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        keys._is_signed.cache_clear()  # a real device has seen none of it
        began = time.perf_counter()
        said = work()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
        return said

    for name, session in sessions.items():
        server.take_advert(name, timed(name, partial(getattr, session, "advert")))
    server.close_keys()
    for name, session in sessions.items():
        server.take_shares(name, timed(name, partial(session.shares, server.names, server.adverts_for(name))))
    members = server.members
    for name in (n for n in members if n not in lost):
        session, inbox = sessions[name], server.inbox(name)
        numbers[name] = code.encoded(rng.normal(size=code.width) / code.width, rng.normal(size=code.width))

        def masked(session: Session = session, inbox: dict[str, bytes] = inbox, name: str = name) -> np.ndarray:
            session.receive(members, inbox)
            return session.masked(numbers[name], code.bits)

        server.take_masked(name, timed(name, masked))
    came = sorted(server.came)
    for name in came:
        server.take_confirmation(name, timed(name, partial(sessions[name].confirm, came)))
    for name in came:
        server.take_parts(name, timed(name, partial(sessions[name].unmask, server.confirmations_for(name))))
    return numbers


def as_json(found: Outcome) -> dict[str, Any]:
    """For programs."""
    return {"machine": machine("cpu"), "width": found.width, "rows": [asdict(r) for r in found.rows]}


def as_table(found: Outcome) -> Group:
    """For people."""
    title = f"one round of secure aggregation, rows of {found.width:,} numbers, one device in {LOST} lost"
    table = Figures(title=title, title_style="")
    for heading in ("devices", "neighbours", "bits", "up, bytes", "beside the numbers", "down, bytes", "device, ms",
                    "server, ms", "plain sum, ms", "SecAgg+ up", "down", "device, ms", "server, ms"):  # fmt: skip
        table.add_column(heading, justify="right")
    for r in found.rows:
        table.add_row(
            f"{r.devices:,}", f"{r.neighbours:,}", str(r.bits), f"{r.up_bytes:,}", f"{r.beside_bytes:,}",
            f"{r.down_bytes:,}", f"{r.device_ms:.1f}", f"{r.server_ms:.1f}", f"{r.plain_ms:.2f}",
            f"{r.flower.up_bytes:,}", f"{r.flower.down_bytes:,}", f"{r.flower.device_ms:.1f}",
            f"{r.flower.server_ms:.1f}",
        )  # fmt: skip
    return Group(table)
