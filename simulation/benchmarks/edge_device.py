"""What talking and learning take of a small board: seconds and memory, under limits that the kernel enforces.

Each cell runs an agent in a process of its own, with so many threads, in a control group with so much memory where
one can be made (as root), and with the agent's own limit. It talks, through PyTorch or llama.cpp, and learns: a cycle
takes up eight real dialogues, selects, writes similar ones and trains the personal adapter, all as a device is set by
default. Memory is what is resident: libraries and mapped files too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import florilegium
from florilegium.client.agent.memory_limits import GIB, thrifty
from florilegium.client.lm.config import ModelConfig
from florilegium.client.terminal import Figures
from florilegium.simulation.data.population import DataConfig, load_population
from florilegium.simulation.runs.stopping import run_child

GROUPS = Path("/sys/fs/cgroup")
DIALOGUES = 8


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
    weights: str = "float"
    generation: str = "torch"
    first_token_s: float | None = None
    talking_bytes: int | None = None  # resident after the first replies
    idle_bytes: int | None = None  # resident after learning, when nothing is asked
    cycle_s: float | None = None
    examples: int | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    tokens_at_once: int | None = None


def measure(
    models: Sequence[str],
    threads: Sequence[int],
    limits_gib: Sequence[float],
    dtypes: Sequence[str],
    weights: Sequence[str],
    forms: Sequence[str],
    generations: Sequence[str],
    turns: int,
    learn: bool,
    tell: Callable[[str], object],
) -> list[Cycle]:
    """Every model in every form, with so many threads, under every limit, through all that talks; turn by turn."""
    (person,) = load_population(DataConfig(users=1, split="development", max_pairs=40), seed=0)
    dialogues, rows = [(had.prompt, had.response) for had in person.stream[:DIALOGUES]], list[Cycle]()
    cells = product(range(turns), models, dtypes, weights, forms, threads, limits_gib, generations)
    for turn, name, dtype, held, form, count, limit, generation in cells:
        tell(f"{name} {dtype} {held} {form}, {generation}, {count} threads, {limit:g} GiB, turn {turn + 1}")
        model = thrifty(name, 0) if form == "thrifty" else ModelConfig(name=name)
        model = ModelConfig.model_validate({**model.model_dump(), "dtype": dtype, "weights": held})
        rows.append(_measured(model, count, limit, generation, learn, dialogues))
    return rows


def _measured(
    model: ModelConfig,
    threads: int,
    limit_gib: float,
    generation: str,
    learn: bool,
    dialogues: Sequence[tuple[str, str]],
) -> Cycle:
    limit = int(limit_gib * GIB)
    with TemporaryDirectory() as folder, _group(limit) as group:
        (Path(folder) / "dialogues.json").write_text(json.dumps(dialogues), encoding="utf-8")
        command = [
            sys.executable, "-m", "florilegium.simulation.benchmarks.edge_device_cycle", model.model_dump_json(),
            str(limit), str(threads), folder, generation,
            "learn" if learn else "talk", *([str(group)] if group else []),
        ]  # fmt: skip
        root = str(Path(florilegium.__file__).parent.parent)
        done = run_child(command, Path.cwd(), {**os.environ, "PYTHONPATH": root})
    known = (model.name, model.dtype, model.checkpointing, threads, limit_gib, group is not None)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return Cycle(*known, "killed" if done.returncode < 0 else lines[-1][:120], model.weights, generation)
    told = json.loads(done.stdout.strip().splitlines()[-1])
    names = ("first_token_s", "talking_bytes", "idle_bytes", "cycle_s", "examples", "tokens_per_s", "peak_bytes",
             "tokens_at_once")  # fmt: skip
    return Cycle(*known, "well", model.weights, generation, *(told[n] for n in names))


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


def _gb(size: int | None) -> float:
    return (size or 0) / 1e9


def as_json(rows: Sequence[Cycle]) -> list[dict[str, Any]]:
    """For programs."""
    return [asdict(row) for row in rows]


def as_table(rows: Sequence[Cycle]) -> Figures:
    """For people."""
    table = Figures(title="eight dialogues taken up and learned from", title_style="")
    for heading in ("model", "talks by", "threads", "limit, GiB", "first token, s", "tokens/s", "talking, GB",
                    "cycle, s", "examples", "peak, GB", "idle, GB", "at once"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("model", "talks by") else "right")
    for r in rows:
        held = "" if r.weights == "float" else f" {r.weights}"
        name = f"{Path(r.model).name} {r.dtype}{held}{' thrifty' if r.thrifty else ''}"
        known = (name, r.generation, str(r.threads), f"{r.limit_gib:g}")
        if r.ended != "well":
            table.add_row(*known, r.ended)
            continue
        figures = (r.first_token_s, r.tokens_per_s, _gb(r.talking_bytes), r.cycle_s)
        told = [f"{x:.2f}" for x in (*figures, _gb(r.peak_bytes), _gb(r.idle_bytes)) if x is not None]
        table.add_row(*known, *told[:4], str(r.examples), *told[4:], str(r.tokens_at_once))
    return table
