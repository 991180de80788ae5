"""How far a run is: on a terminal a line of device-visits that are done of all that there will be, and how fast they
go; elsewhere, as in a log, a line for each round, and for each phase before the first and after the last.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from florilegium.server.config import devices_to_ask
from florilegium.simulation.config import ExperimentConfig

VISITS = 2  # of a device in a round: a release, and the adoption of what it became
WINDOW = 50  # changes that speeds are taken over


@dataclass
class RunProgress:
    """What a run has done, for whoever watches it; `changed` is called after each change."""

    phase: str = "loading"
    round: int = 0
    visits: int = 0
    tokens: int = 0  # trained
    changed: Callable[[], None] = field(default=lambda: None)

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.changed()

    def visit(self, devices: int) -> None:
        self.visits += devices
        self.changed()

    def end_round(self, number: int, tokens: int) -> None:
        self.round, self.tokens = number, self.tokens + tokens
        self.changed()


def tell_data(told: Iterable[str], console: Console) -> None:
    """Says how the data was read, before a run begins."""
    for line in told:
        console.print(Text(f"data: {line}"), soft_wrap=True)


@contextmanager
def progress_line(config: ExperimentConfig, console: Console) -> Iterator[RunProgress]:
    """Yields the pulse that it shows."""
    if not console.is_terminal:
        yield Log(config, console)
        return
    asked = min(config.data.users, devices_to_ask(config.server.wanted(config.data.users), config.world.over_sampling))
    total = config.rounds * VISITS * (config.server.buffer or asked)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task, progress = bar.add_task(f"{config.name}: loading", total=total), RunProgress()
        speed = Speed()

        def show() -> None:
            where = f"round {min(progress.round + 1, config.rounds)} of {config.rounds}, {progress.phase}"
            bar.update(task, completed=progress.visits, description=f"{config.name}: {where}{speed.told(progress)}")

        progress.changed = show
        yield progress
        bar.update(task, completed=total, description=f"{config.name}: done{speed.told(progress)}")


class Log(RunProgress):
    """The pulse of a run that nobody watches: it is written down."""

    def __init__(self, config: ExperimentConfig, console: Console) -> None:
        super().__init__(phase="")
        self._config, self._console = config, console
        self._began, self._before = time.monotonic(), 0
        self.enter("loading")

    def enter(self, phase: str) -> None:
        outside = self.round in (0, self._config.rounds) and self.visits == self._before
        if outside and phase != self.phase:
            self._told(phase)
        super().enter(phase)

    def end_round(self, number: int, tokens: int) -> None:
        now = time.monotonic()
        seconds, devices = now - self._began, (self.visits - self._before) // VISITS
        self._began, self._before = now, self.visits
        self._told(
            f"round {number} of {self._config.rounds}, {devices:,} devices, {seconds:.1f} s, "
            f"{tokens / max(1e-9, seconds):,.0f} tokens/s, {resident_bytes() / 1e9:.1f} GB"
        )
        super().end_round(number, tokens)

    def _told(self, text: str) -> None:
        self._console.print(f"{self._config.name}: {text}", soft_wrap=True, highlight=False)


class Speed:
    """Device-visits a second of late, trained tokens a second of the whole run, and memory with all processes."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.late: deque[tuple[float, int]] = deque([(self.began, 0)], maxlen=WINDOW)

    def told(self, progress: RunProgress) -> str:
        now = time.monotonic()
        if progress.visits != self.late[-1][1]:
            self.late.append((now, progress.visits))
        then, visits = self.late[0]
        devices = (progress.visits - visits) / max(1e-9, now - then)
        tokens = progress.tokens / max(1e-9, now - self.began)
        return f" | {devices:.1f} devices/s | {tokens:,.0f} tokens/s | {resident_bytes() / 1e9:.1f} GB"


def resident_bytes() -> int:
    """Of this process and of all that it started, Ray's among them."""
    found = 0
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        try:
            found += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found
