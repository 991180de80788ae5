"""`florilegium bench agent`: a device's page under clients that rate and read without a pause, as fast as it answers.

The agent runs in a process of its own, with `nano` in its memory and dialogues in its vault; what asks is in this one,
and takes its share of the same processors. Each client has dialogues of its own; at the end the vault is asked whether
the last rating that was acknowledged is there. Not covered: talk, of which one at a time goes through the model.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

from florilegium.client.terminal import Figures
from florilegium.simulation.benchmarks.engine import machine
from florilegium.simulation.benchmarks.separate_process import answered, apart, memory_watched

READS = ("consents", "status", "profile", "sent")  # as the page asks for them, each in its turn
DIALOGUES = 200
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Measured:
    """With so many clients; milliseconds of a request are from its first byte to its answer's last."""

    clients: int
    seconds: float
    requests_s: float
    rating_median_ms: float
    rating_p95_ms: float
    reading_median_ms: float
    reading_p95_ms: float
    largest_ms: float
    failed: int  # clients that lost their connection or got another answer than 200
    lost: int  # dialogues whose last acknowledged rating is not in the vault
    memory_largest_mb: float
    cpu: float  # processors that the agent kept busy


@dataclass
class Times:
    """Of what one client asked, and what it was told last of its dialogues."""

    rating: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)
    rated: dict[str, str] = field(default_factory=dict)
    failed: bool = False


def measure(clients: list[int], seconds: float, tell: Callable[[str], object]) -> list[Measured]:
    """So many clients at once for so long, one number of them after the other; at most `DIALOGUES`."""
    with TemporaryDirectory() as folder, apart(_serve, folder) as ((port, token, dialogues), watched):
        rows = []
        for number in clients:
            tell(f"{number} clients")
            rows.append(_measured(number, seconds, port, token, dialogues, watched))
        return rows


def _serve(folder: str, there: Connection) -> None:
    from florilegium.client.agent.agent import Agent
    from florilegium.client.agent.config import new_config
    from florilegium.client.agent.daemon import showing
    from florilegium.client.agent.device import Device
    from florilegium.client.agent.folder import DeviceFolder
    from florilegium.client.lm.config import ModelConfig
    from florilegium.client.lm.model import LanguageModel

    model, home = ModelConfig(name="nano"), DeviceFolder(Path(folder) / "device")
    config = new_config(model)
    agent = Agent(Device(home, config, LanguageModel.load(model), home.make(config)))
    agent.consent("learn", True)
    dialogues = [agent.device.vault.add(f"What is the {k}th of all?", "Nobody knows.", "").id for k in range(DIALOGUES)]
    with home.locked(), showing(agent, 0) as address:
        there.send((int(address.rstrip("/").rpartition(":")[2]), agent.page_token, dialogues))
        while True:
            time.sleep(60)


def _measured(
    number: int, seconds: float, port: int, token: str, dialogues: list[str], watched: psutil.Process
) -> Measured:
    spent, began = sum(watched.cpu_times()[:2]), time.perf_counter()
    found, memory = asyncio.run(_all(number, seconds, port, token, dialogues, watched))
    cpu = (sum(watched.cpu_times()[:2]) - spent) / (time.perf_counter() - began)
    kept = {turn["id"]: turn["wanted"] for turn in asyncio.run(_kept(port, token))}
    lost = sum(kept[identity] != wanted for one in found for identity, wanted in one.rated.items())
    rating, reading = ([1000 * t for one in found for t in getattr(one, kind)] for kind in ("rating", "reading"))
    (rating_median, rating_p95), (reading_median, reading_p95) = (
        (float(q) for q in np.quantile(times or [np.nan], (0.5, 0.95))) for times in (rating, reading)
    )
    return Measured(
        clients=number,
        seconds=seconds,
        requests_s=(len(rating) + len(reading)) / seconds,
        rating_median_ms=rating_median,
        rating_p95_ms=rating_p95,
        reading_median_ms=reading_median,
        reading_p95_ms=reading_p95,
        largest_ms=max([*rating, *reading], default=np.nan),
        failed=sum(one.failed for one in found),
        lost=lost,
        memory_largest_mb=memory / 1e6,
        cpu=cpu,
    )


async def _all(
    number: int, seconds: float, port: int, token: str, dialogues: list[str], watched: psutil.Process
) -> tuple[list[Times], int]:
    until = time.perf_counter() + seconds
    async with memory_watched(watched) as memory:
        found = await asyncio.gather(*(_one(dialogues[k::number], port, token, until) for k in range(number)))
    return found, memory.largest_bytes


async def _one(dialogues: list[str], port: int, token: str, until: float) -> Times:
    """A client over one connection: rates, reads, rates the next."""
    times = Times()
    try:
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        for turn in count():
            identity, wanted = dialogues[turn % len(dialogues)], f"The {turn}th answer."
            body = {"id": identity, "liked": turn % 2 == 0, "wanted": wanted}
            began = time.perf_counter()
            await _asked(reader, writer, port, token, "rate", body)
            times.rated[identity] = wanted
            times.rating.append(time.perf_counter() - began)
            began = time.perf_counter()
            await _asked(reader, writer, port, token, READS[turn % len(READS)])
            times.reading.append(time.perf_counter() - began)
            if began > until:
                break
        writer.close()
    except (OSError, ValueError, asyncio.IncompleteReadError):
        times.failed = True
    return times


async def _kept(port: int, token: str) -> list[dict[str, Any]]:
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    found: list[dict[str, Any]] = json.loads(await _asked(reader, writer, port, token, "dialogues"))
    writer.close()
    return found


async def _asked(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, token: str, path: str, body: Any = None
) -> bytes:
    """What is answered. Raises ValueError for any answer but 200."""
    sent = b"" if body is None else json.dumps(body).encode()
    heads = f"host: {LOOPBACK}:{port}\r\nauthorization: Bearer {token}\r\ncontent-length: {len(sent)}\r\n\r\n"
    writer.write(f"{'POST' if sent else 'GET'} /api/{path} HTTP/1.1\r\n{heads}".encode() + sent)
    await writer.drain()
    return await answered(reader)


def as_json(rows: list[Measured]) -> dict[str, Any]:
    """For programs."""
    return {"machine": machine("cpu"), "rows": [asdict(row) for row in rows]}


def as_table(rows: list[Measured]) -> Figures:
    """For people."""
    table = Figures(title="clients that rate and read without a pause", title_style="")
    for heading in ("clients", "requests/s", "rating, ms", "95 %", "reading, ms", "95 %", "largest", "failed", "lost",
                    "MB", "CPUs"):  # fmt: skip
        table.add_column(heading, justify="right")
    for r in rows:
        numbers = (r.rating_median_ms, r.rating_p95_ms, r.reading_median_ms, r.reading_p95_ms, r.largest_ms)
        table.add_row(
            str(r.clients), f"{r.requests_s:.0f}", *(f"{n:.1f}" for n in numbers), str(r.failed), str(r.lost),
            f"{r.memory_largest_mb:.0f}", f"{r.cpu:.2f}",
        )  # fmt: skip
    return table
