"""`florilegium bench engine`: how fast K devices are served, ours beside what a user would take instead.

Arms take turns within each repeat, so that a busy machine is busy for all; ratios are of the same repeat. The
machine's limit is measured in every repeat too: a large product of matrices on all threads, or one on each core side
by side, whichever is the better.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from rich.console import Group

from florilegium.client.lm.hub import default_device
from florilegium.client.terminal import Figures
from florilegium.privacy.common.machine import cores
from florilegium.simulation.benchmarks.arguments import DTYPES, KINDS
from florilegium.simulation.benchmarks.engine_worker import AbsentError, Answer, Worker
from florilegium.simulation.benchmarks.engine_workload import NODES, ModelSize, Workload

OURS = "florilegium"
CONTRAST = "florilegium-contrast"  # generation that reads each text twice, with the adapters and without
CORES, ONE_CORE = "florilegium-cores", "florilegium-one-core"  # processes of one thread: as many as cores, or one
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
RIVALS = {
    "training": ("peft", "peft-cores", "pfl", "flower"),
    "embedding": ("peft",),
    "generation": ("peft",),
    "dp_training": ("opacus",),
}
ONE_BY_ONE = 8  # devices that a rival does in one repeat: one after the other, so their number does not matter
COLUMNS = ("arm", "type", "devices", "examples", "devices / s", "tokens / s", "MB", "of limit", "times as fast as")
MOST = 4  # examples a step of what is not training
TOGETHER = 256  # examples a step of all devices, where each has several


@dataclass
class Row:
    """One line of the table."""

    arm: str
    dtype: str
    work: Workload
    answers: list[Answer] = field(default_factory=list)
    peak_bytes: int | None = None
    first: list[Any] = field(default_factory=list)  # results of the warm-up

    @property
    def devices_per_s(self) -> list[float]:
        return [self.work.devices / a.seconds for a in self.answers]


def plan(
    kinds: Sequence[str], devices: Sequence[int], examples: Sequence[int], steps: int, dtypes: Sequence[str]
) -> list[Row]:
    """Every line that is to be measured, the rivals first.

    All numbers of devices train with one example a step; with more of them, and in other kinds, 64 devices do.
    """
    some = min(64, max(devices))
    rows = []
    for kind in kinds:
        beside = [(min(some, max(1, TOGETHER // e)), e) for e in examples if kind == "training" or e <= MOST]
        alone = [(k, 1) for k in devices] if kind == "training" and 1 in examples else []
        sizes = sorted({*alone, *beside}, key=lambda size: (size[1], size[0]))
        for each in sorted({e for _, e in sizes}):
            for arm in RIVALS[kind]:
                if arm == "flower":
                    there = each == 1 and "float32" in dtypes
                    rows += [Row(arm, "float32", Workload(kind, NODES, each, steps))] if there else []
                else:
                    count = min(ONE_BY_ONE, some) * (cores() if arm == "peft-cores" else 1)
                    rows += [Row(arm, dtype, Workload(kind, count, each, steps)) for dtype in dtypes]
        arms = (CONTRAST, OURS) if kind == "generation" else (OURS,)
        rows += [Row(arm, dtype, Workload(kind, k, e, steps)) for arm in arms for k, e in sizes for dtype in dtypes]
        if kind == "training":
            each_core = [(ONE_CORE, s) for s in beside] + [(CORES, s) for s in sizes if s in beside or s[0] > some]
            rows += [Row(arm, dtype, Workload(kind, k, e, steps)) for arm, (k, e) in each_core for dtype in dtypes]
    return rows


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured."""

    rows: list[Row]
    limit_gflops: dict[str, float]
    absent: dict[str, str]
    size: ModelSize
    machine: dict[str, Any]


def measure(
    model: str,
    devices: Sequence[int],
    kinds: Sequence[str],
    examples: Sequence[int],
    steps: int,
    repeats: int,
    dtypes: Sequence[str],
    tell: Callable[[str], object],
) -> Outcome:
    """Runs all arms that are installed, and says of the others why they are not there.

    Where no `dtypes` are named, one that this machine emulates is among the others.
    """
    device, absent = default_device(), dict[str, str]()
    if not dtypes:
        absent |= emulated(device)
        dtypes = [dtype for dtype in DTYPES if SHORT[dtype] not in absent]
    rows = plan(kinds, devices, examples, steps, dtypes)
    workers: dict[tuple[str, str], Worker] = {}
    limits: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    try:
        for arm, dtype in dict.fromkeys((r.arm, r.dtype) for r in rows):
            tell(f"starting {arm} {SHORT[dtype]}")
            try:
                workers[arm, dtype] = Worker(arm, model, dtype, device)
            except AbsentError as error:
                absent[f"{arm} {SHORT[dtype]}"] = str(error)
        estimate = Estimate(repeats)
        for repeat in range(-1, repeats):
            for row in [r for r in rows if (r.arm, r.dtype) in workers]:
                tell(f"{'warming up' if repeat < 0 else f'repeat {repeat + 1} of {repeats}'}: {_title(row)}{estimate}")
                began = time.perf_counter()
                try:
                    answer = workers[row.arm, row.dtype].measure(row.work, memory=repeat < 0)
                except AbsentError as error:
                    absent[_title(row)] = str(error)
                    rows.remove(row)
                    continue
                if repeat < 0:
                    row.peak_bytes, row.first = answer.peak_bytes, answer.results
                else:
                    row.answers.append(answer)
                estimate.add(time.perf_counter() - began, warming_up=repeat < 0)
            for dtype in dtypes:
                limits[dtype].append(limit_gflops(getattr(torch, dtype), device, on_each_core=True))
        ours = [w.size for (arm, _), w in workers.items() if arm == OURS]
    except BaseException:
        for worker in workers.values():
            worker.kill()
        raise
    for worker in workers.values():
        worker.close()
    if not ours:
        raise AbsentError(f"our own arm cannot run here: {absent}")
    measured = [r for r in rows if r.answers]
    return Outcome(measured, {d: median(v) for d, v in limits.items()}, absent, ours[0], machine(device))


@dataclass
class Estimate:
    """How long a benchmark still takes, by what each of its parts took before; told once all were warmed up."""

    repeats: int
    warmed_up: float = 0.0  # seconds of all rows once
    spent: float = 0.0  # since

    def add(self, seconds: float, *, warming_up: bool) -> None:
        if warming_up:
            self.warmed_up += seconds
        else:
            self.spent += seconds

    def __str__(self) -> str:
        left = self.warmed_up * self.repeats - self.spent
        return f" (about {max(left, 0) / 60:.0f} min left)" if self.spent else ""


def emulated(device: str) -> dict[str, str]:
    """The short names of types whose products take ten times those of float32 or more, each with its figures.

    A processor without instructions for bfloat16 takes hundreds of times.
    """
    speeds = {dtype: limit_gflops(getattr(torch, dtype), device, side=256) for dtype in DTYPES}
    told = (
        "{:,.2f} GFLOPS where float32 has {:,.0f}: emulated here, and not measured; --dtypes measures it all the same"
    )
    slow = {dtype: speed for dtype, speed in speeds.items() if 10 * speed < speeds["float32"]}
    return {SHORT[dtype]: told.format(speed, speeds["float32"]) for dtype, speed in slow.items()}


def limit_gflops(dtype: torch.dtype, device: str, side: int = 0, *, on_each_core: bool = False) -> float:
    """The best of four products of two large square matrices, in 10⁹ operations a second.

    With `on_each_core` also of products on one thread each, side by side, if these come to more together.
    """
    side = side or (2048 if device == "cpu" else 8192)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def best(threads: int = 0) -> float:
        if threads:
            torch.set_num_threads(threads)  # of this thread of Python's
        found = 0.0
        for _ in range(4):
            began = time.perf_counter()
            float((a @ b)[0, 0])  # waits for it
            found = max(found, 2.0 * side**3 / (time.perf_counter() - began) / 1e9)
        return found

    together, threads = best(), torch.get_num_threads()
    if not on_each_core or device != "cpu":
        return together
    with ThreadPoolExecutor(cores()) as pool:
        apart = sum(pool.map(best, [1] * cores()))
    torch.set_num_threads(threads)
    return max(together, apart)


def machine(device: str) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": cores(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _title(row: Row) -> str:
    return f"{row.work.kind} {row.arm} {SHORT[row.dtype]}, {row.work.devices} devices × {row.work.examples_per_step}"


# -- what it says -----------------------------------------------------------------------------------------------------


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The figures as one object; rates are medians over the repeats."""
    found: dict[str, Any] = {
        "machine": outcome.machine,
        "limit_gflops": {SHORT[d]: v for d, v in outcome.limit_gflops.items()},
    }
    for kind in KINDS:
        found[kind] = [_entry(r, outcome) for r in outcome.rows if r.work.kind == kind]
    return found | {"absent": outcome.absent}


def _entry(row: Row, outcome: Outcome) -> dict[str, Any]:
    rates, tokens = row.devices_per_s, row.work.tokens
    entry: dict[str, Any] = {
        "arm": row.arm,
        "dtype": SHORT[row.dtype],
        "devices": row.work.devices,
        "examples_per_step": row.work.examples_per_step,
        "tokens": tokens,
        "devices_per_s": {"median": median(rates), "min": min(rates), "max": max(rates)},
        "tokens_per_s": median(rates) * tokens / row.work.devices,
        "peak_bytes": row.peak_bytes,
        "limit_share": limit_share(row, outcome),
    }
    if row.arm in (OURS, CORES):
        entry["ratios"] = [
            {"to": rival.arm, "dtype": SHORT[rival.dtype], "times": times, "result_difference": difference(row, rival)}
            for rival, times in ratios(row, outcome.rows)
        ]
    return entry


def limit_share(row: Row, outcome: Outcome) -> float:
    """Of the large product's speed in the same type, by the model's operations alone."""
    per_device = row.work.flops(outcome.size) / row.work.devices
    return median(row.devices_per_s) * per_device / 1e9 / outcome.limit_gflops[row.dtype]


def ratios(row: Row, rows: Sequence[Row]) -> Iterator[tuple[Row, dict[str, float]]]:
    """How many times a rival's devices a second, repeat by repeat."""
    for rival in rows:
        same = rival.work.kind == row.work.kind and rival.work.examples_per_step == row.work.examples_per_step
        if rival.arm not in (OURS, CORES) and same:
            times = [a / b for a, b in zip(row.devices_per_s, rival.devices_per_s, strict=True)]
            yield rival, {"median": median(times), "min": min(times), "max": max(times)}


def difference(row: Row, rival: Row) -> float:
    """Largest difference between the results of the devices that both did; of token ids, the share that differs."""
    pairs = list(zip(row.first, rival.first, strict=False))
    if row.work.kind == "generation":
        tokens: list[bool] = [a != b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
        return sum(tokens) / len(tokens)
    return float(max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs))


def as_table(outcome: Outcome) -> Group:
    """The figures for people."""
    limits = ", ".join(f"{SHORT[d]} {v:,.0f} GFLOPS" for d, v in outcome.limit_gflops.items())
    machine = outcome.machine
    parts: list[Any] = [f"{machine['processor']}, {machine['cores']} cores, {machine['device']}; limit {limits}"]
    for kind in dict.fromkeys(r.work.kind for r in outcome.rows):
        table = Figures(title=kind.replace("_", " "), title_justify="left", box=None, pad_edge=False)
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("arm", "type", COLUMNS[-1]) else "right")
        for row in (r for r in outcome.rows if r.work.kind == kind):
            table.add_row(*_cells(_entry(row, outcome)))
        parts += ["", table]
    parts += ["", *(f"absent: {name}: {reason}" for name, reason in outcome.absent.items())]
    return Group(*parts)


def _cells(entry: dict[str, Any]) -> list[str]:
    rates, peak = entry["devices_per_s"], entry["peak_bytes"]
    ratios = [(r["to"], r["dtype"], r["times"]) for r in entry.get("ratios", [])]
    return [
        entry["arm"],
        entry["dtype"],
        str(entry["devices"]),
        str(entry["examples_per_step"]),
        f"{rates['median']:.2f} ({rates['min']:.2f}–{rates['max']:.2f})",
        f"{entry['tokens_per_s']:,.0f}",
        "" if peak is None else f"{peak / 1e6:,.0f}",
        f"{entry['limit_share']:.0%}",
        ", ".join(f"{arm} {d} {t['median']:.1f} ({t['min']:.1f}–{t['max']:.1f})" for arm, d, t in ratios),
    ]
