"""What a learning cycle takes of a small board: seconds and memory, under limits that the kernel enforces.

Each cell runs an agent in a process of its own, with so many threads, in a control group with so much memory where
one can be made (as root), and with the agent's own limit. A cycle takes up eight real dialogues, selects, writes
similar ones and trains the personal adapter, all as a device is set by default.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import florilegium
from florilegium.client.agent.memory_limits import GIB, thrifty
from florilegium.client.lm.config import ModelConfig
from florilegium.client.terminal import Figures
from florilegium.simulation.runs.stopping import run_child

GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cycle:
    """One agent's cycle; numbers are None where it did not come to its end."""

    model: str
    dtype: str
    thrifty: bool
    threads: int
    limit_gib: float
    in_group: bool  # whether the kernel counts all of its memory, not the agent's own alone
    ended: str  # "well", "killed", or what was told
    cycle_s: float | None = None
    examples: int | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    tokens_at_once: int | None = None


def measure(
    models: Sequence[str], threads: Sequence[int], limits_gib: Sequence[float], tell: Callable[[str], object]
) -> list[Cycle]:
    """Every model as it is and thrifty, in float32 and bfloat16, with so many threads, under every limit."""
    rows = []
    for name in models:
        for dtype in ("float32", "bfloat16"):
            for model in (ModelConfig(name=name, dtype=dtype), thrifty(name, 0).model_copy(update={"dtype": dtype})):
                for count in threads:
                    for limit in limits_gib:
                        tell(f"{name} {dtype} thrifty={model.checkpointing}, {count} threads, {limit:g} GiB")
                        rows.append(_measured(model, count, limit))
    return rows


def _measured(model: ModelConfig, threads: int, limit_gib: float) -> Cycle:
    limit = int(limit_gib * GIB)
    with TemporaryDirectory() as folder, _group(limit) as group:
        command = [
            sys.executable, "-m", "florilegium.simulation.benchmarks.edge_device_cycle", model.model_dump_json(),
            str(limit), str(threads), folder, *([str(group)] if group else []),
        ]  # fmt: skip
        root = str(Path(florilegium.__file__).parent.parent)
        done = run_child(command, Path.cwd(), {**os.environ, "PYTHONPATH": root})
    known = (model.name, model.dtype, model.checkpointing, threads, limit_gib, group is not None)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return Cycle(*known, "killed" if done.returncode < 0 else lines[-1][:120])
    told = json.loads(done.stdout.strip().splitlines()[-1])
    names = ("cycle_s", "examples", "tokens_per_s", "peak_bytes", "tokens_at_once")
    return Cycle(*known, "well", *(told[n] for n in names))


@contextmanager
def _group(limit: int) -> Iterator[Path | None]:
    """A control group that gets at most `limit` bytes; None where this process may not make one."""
    first = (GROUPS / "memory", "memory.limit_in_bytes")  # of version 1
    parent, setting = first if first[0].is_dir() else (GROUPS, "memory.max")
    made = parent / f"florilegium-{os.getpid()}"
    try:
        made.mkdir()
        (made / setting).write_text(str(limit), encoding="ascii")
    except OSError:
        if made.is_dir():
            made.rmdir()
        yield None
        return
    try:
        yield made
    finally:
        made.rmdir()


def as_json(rows: Sequence[Cycle]) -> list[dict[str, Any]]:
    """For programs."""
    return [asdict(row) for row in rows]


def as_table(rows: Sequence[Cycle]) -> Figures:
    """For people."""
    table = Figures(title="eight dialogues taken up and learned from", title_style="")
    for heading in ("model", "threads", "limit, GiB", "cycle, s", "examples", "tokens/s", "peak, GB", "at once"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for r in rows:
        name = f"{r.model} {r.dtype}{' thrifty' if r.thrifty else ''}"
        if r.cycle_s is None or r.peak_bytes is None or r.tokens_per_s is None:
            table.add_row(name, str(r.threads), f"{r.limit_gib:g}", r.ended)
            continue
        table.add_row(
            name, str(r.threads), f"{r.limit_gib:g}", f"{r.cycle_s:.1f}", str(r.examples), f"{r.tokens_per_s:.1f}",
            f"{r.peak_bytes / 1e9:.2f}", str(r.tokens_at_once),
        )  # fmt: skip
    return table
