"""`florilegium bench door`: the server's door under many registered devices that ask whether there is something to do.

As Flower's SuperNodes do it, each asks every three seconds over a connection that it keeps. The door runs in a process
of its own; what asks is in this one, and takes its share of the same processors.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from rich.table import Table

from florilegium.simulation.benchmarks.engine import machine
from florilegium.simulation.benchmarks.separate_process import answered, apart, memory_watched
from florilegium.simulation.deployment.certificates import CA, CERTIFICATE, KEY, make_certificates
from florilegium.simulation.deployment.https_server import PREFIX, Allowed, device_server
from florilegium.simulation.deployment.link import Link

EVERY_S = 3.0
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Measured:
    devices: int
    seconds: float
    requests_s: float
    median_ms: float
    p95_ms: float
    largest_ms: float
    failed: int
    memory_before_mb: float  # with all devices registered and none connected
    memory_largest_mb: float
    cpu: float  # processors that the door kept busy


def measure(devices: int, seconds: float, port: int, tell: Callable[[str], object]) -> Measured:
    """So many devices for so long, after all have connected."""
    tell(f"{devices} devices")
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in range(devices)]
    pems = {f"device-{k:05d}": public_key_to_bytes(key.public_key()) for k, key in enumerate(keys)}
    with TemporaryDirectory() as folder:
        make_certificates(Path(folder) / "server", [LOOPBACK])
        with apart(_serve, Path(folder) / "server", pems, port) as (nodes, watched):
            before, spent = watched.memory_info().rss, sum(watched.cpu_times()[:2])
            asks = [_request(key, nodes[name]) for key, name in zip(keys, pems, strict=True)]
            trust = ssl.create_default_context(cafile=str(Path(folder) / "server" / CA))
            began = time.perf_counter()
            times, failed, largest = asyncio.run(_all(asks, seconds, port, trust, watched))
            took = time.perf_counter() - began
            cpu = (sum(watched.cpu_times()[:2]) - spent) / took
    median, p95, most = (float(q) for q in np.quantile(1000 * np.array(times), (0.5, 0.95, 1)))
    return Measured(
        devices, took, len(times) / seconds, median, p95, most, failed, before / 1e6, largest / 1e6, cpu
    )  # fmt: skip


def _serve(folder: Path, keys: dict[str, bytes], port: int, there: Connection) -> None:
    link = Link()
    link.set_admitted(keys)
    with device_server(link, LOOPBACK, port, folder / CERTIFICATE, folder / KEY, Allowed()):
        there.send(link.nodes)
        while True:
            time.sleep(60)


def _request(key: ec.EllipticCurvePrivateKey, node: int) -> bytes:
    """Signed once: a signature is good for five minutes."""
    stamp = now().isoformat()
    body: bytes = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    heads = {
        "host": LOOPBACK,
        "content-type": "application/x-protobuf",
        "content-length": str(len(body)),
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, stamp.encode())).decode(),
        TIMESTAMP_HEADER: stamp,
    }
    told = "".join(f"{name}: {value}\r\n" for name, value in heads.items())
    return f"POST {PREFIX}pull-messages HTTP/1.1\r\n{told}\r\n".encode() + body


async def _all(
    asks: list[bytes], seconds: float, port: int, trust: ssl.SSLContext, watched: psutil.Process
) -> tuple[list[float], int, int]:
    times, failed = list[float](), 0
    connected, begin = 0, asyncio.Event()

    async def one(number: int, ask: bytes) -> None:
        nonlocal failed, connected
        try:
            await asyncio.sleep(number * 0.01)  # handshakes one after the other
            reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=trust, ssl_handshake_timeout=60)
            await _asked(reader, writer, ask)
            connected += 1
            if connected + failed == len(asks):
                begin.set()
            await begin.wait()
            await asyncio.sleep(EVERY_S * number / len(asks))
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                began = time.perf_counter()
                await _asked(reader, writer, ask)
                times.append(time.perf_counter() - began)
                await asyncio.sleep(max(0.0, EVERY_S - (time.perf_counter() - began)))
            writer.close()
        except (OSError, ValueError, asyncio.IncompleteReadError):
            failed += 1
            if connected + failed >= len(asks):
                begin.set()

    async with memory_watched(watched) as memory:
        await asyncio.gather(*(one(k, ask) for k, ask in enumerate(asks)))
    return times, failed, memory.largest_bytes


async def _asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ask: bytes) -> None:
    """Raises ValueError for any answer but 200."""
    writer.write(ask)
    await writer.drain()
    await answered(reader)


def as_json(found: Measured) -> dict[str, Any]:
    """For programs."""
    return {"machine": machine("cpu"), **asdict(found)}


def as_table(found: Measured) -> Table:
    """For people."""
    table = Table(show_header=False)
    for name, value in asdict(found).items():
        table.add_row(name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else str(value))
    return table
