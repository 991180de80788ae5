"""What a federation costs beside its training: milliseconds of a device in a round, memory, and the start.

Each engine and size runs in a process of its own (`scale_florilegium`, `scale_flower`), in turn; engines take
turns size by size. A device-round of ours is a release and an adoption, with the ledger, the gate, the store and the
events of the run; of Flower's stock simulation it is one message and its reply, with FedAvg. Nobody trains anything.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import florilegium
from florilegium.client.terminal import Figures
from florilegium.simulation.benchmarks.scale_flower import SAMPLED
from florilegium.simulation.runs.stopping import run_child

OURS, STOCK = "florilegium", "flower"


@dataclass(frozen=True)
class Scaled:
    """One engine with so many devices."""

    engine: str
    devices: int
    sampled: int
    ms_per_device_round: float
    driver_peak_bytes: int
    startup_s: float  # until the first round begins


def measure(devices: Sequence[int], stock_until: int, actors: int, tell: Callable[[str], object]) -> list[Scaled]:
    """Ours at every size, Flower's stock simulation up to `stock_until` devices."""
    rows = []
    for count in devices:
        for engine in (OURS, STOCK):
            if engine == STOCK and count > stock_until:
                continue
            tell(f"{engine}, {count:,} devices")
            rows.append(_measured(engine, count, actors))
    return rows


def _measured(engine: str, devices: int, actors: int) -> Scaled:
    """Raises RuntimeError with the end of what the process said."""
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(florilegium.__file__).parent.parent)  # this code, also in Ray's workers
    with TemporaryDirectory() as folder:
        arm = (
            ["scale_florilegium", str(devices), str(actors), folder]
            if engine == OURS
            else ["scale_flower", str(devices)]
        )
        command = [sys.executable, "-m", f"florilegium.simulation.benchmarks.{arm[0]}", *arm[1:]]
        done = run_child(command, Path(folder), environment)
    if done.returncode:
        raise RuntimeError(f"{engine} with {devices} devices: {done.stderr.strip()[-800:]}")
    told = json.loads(done.stdout.strip().splitlines()[-1])
    rounds = [b - a for a, b in zip(told["ended"], told["ended"][1:], strict=False)]
    startup_s = max(0.0, told["ended"][0] - told["began"] - min(rounds))
    sampled = round(SAMPLED * devices)
    return Scaled(engine, devices, sampled, 1000 * median(rounds) / sampled, told["peak_bytes"], startup_s)


def as_json(rows: Sequence[Scaled]) -> list[dict[str, Any]]:
    """For programs."""
    return [asdict(row) for row in rows]


def as_table(rows: Sequence[Scaled]) -> Figures:
    """For people."""
    table = Figures(title="rounds without training; median of three rounds after the first", title_style="")
    for heading in ("engine", "devices", "sampled", "ms a device-round", "driver, GB", "start, s"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for r in rows:
        table.add_row(
            r.engine, f"{r.devices:,}", f"{r.sampled:,}", f"{r.ms_per_device_round:.2f}",
            f"{r.driver_peak_bytes / 1e9:.2f}", f"{r.startup_s:.1f}",
        )  # fmt: skip
    return table
