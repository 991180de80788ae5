"""Benchmarks that are read from their official files, which whoever has them names the folder of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from florilegium.simulation.tasks import personamem
from florilegium.simulation.tasks.lamp import OFFICIAL, load_lamp
from florilegium.simulation.tasks.longlamp import KINDS, load_longlamp
from florilegium.simulation.tasks.peft_u import PARTS, load_peft_u
from florilegium.simulation.tasks.task import Task, TaskUser

Loaded = tuple[Task, list[TaskUser]]
LAMP = "lamp:"


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read: from a folder, of which of its `files`."""

    load: Callable[[Path, str], Loaded]
    files: tuple[str, ...] = ("train", "dev", "test")


def _lamp(number: str, folder: Path, file: str) -> Loaded:
    return OFFICIAL[number].task, load_lamp(folder, number, file)


def _personamem(size: str, folder: Path, file: str) -> Loaded:
    return replace(personamem.TASK, name=f"personamem:{size}"), personamem.load_version_1(folder, size)


def _personamem_v2(size: str, folder: Path, file: str) -> Loaded:
    return replace(personamem.TASK, name=f"personamem-v2:{size}"), personamem.load_version_2(folder, size, file)


def _longlamp(name: str, folder: Path, file: str) -> Loaded:
    return KINDS[name].task, load_longlamp(folder, name, file)


BENCHMARKS = {
    **{LAMP + number: Benchmark(partial(_lamp, number)) for number in OFFICIAL},
    **{f"personamem:{size}": Benchmark(partial(_personamem, size), ("test",)) for size in ("32k", "128k", "1M")},
    **{f"personamem-v2:{size}": Benchmark(partial(_personamem_v2, size)) for size in ("32k", "128k")},
    "peft-u": Benchmark(load_peft_u, tuple(PARTS)),
    **{f"longlamp:{name}": Benchmark(partial(_longlamp, name)) for name in KINDS},
}
