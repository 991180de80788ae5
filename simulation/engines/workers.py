"""The processes that a simulation's devices live in: this one, others of this machine, or Ray actors.

A job is a function of a module, `job(devices, names, shared)`, that is done for one cohort after another, in any
order, each by one process; what they have in common is sent once. A process that is lost takes no result with it: its
cohort is done again by another. Studies and audits have parts instead of devices, with a name each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from florilegium.simulation.runs.errors import RunError

Job = Callable[..., Any]  # (devices, names, shared); of a module: another process finds it by its name
ATTEMPTS = 4  # of a cohort whose processes are lost: then it is the cohort that ends them


@dataclass(frozen=True, slots=True)
class Cohort:
    """Devices that are computed together, and the number of the process that they keep to while it has time."""

    names: tuple[str, ...]
    home: int = 0


Done = tuple[Cohort, Any]


class Told(Protocol):
    """What jobs are done on: a run's devices, a study, an audit."""

    @property
    def listener(self) -> Callable[[str], None] | None:
        """Is told of phases."""

    def telling(self, listener: Callable[[str], None]) -> Self:
        """The same, with another listener."""


class Workers(Protocol):
    """Where jobs are done."""

    @property
    def homes(self) -> int:
        """How many processes devices keep to; 1: whichever is idle takes the next cohort."""

    def map(self, job: Job, cohorts: Sequence[Cohort], shared: Any = None) -> Iterator[Done]:
        """Each cohort with its result, as soon as there is one."""


@dataclass(frozen=True)
class LocalWorkers:
    """All devices in this process."""

    devices: Told

    @property
    def homes(self) -> int:
        return 1

    def map(self, job: Job, cohorts: Sequence[Cohort], shared: Any = None) -> Iterator[Done]:
        return ((cohort, job(self.devices, cohort.names, shared)) for cohort in cohorts)


@dataclass
class Task:
    """A cohort's work, and how often it was begun."""

    cohort: Cohort
    attempts: int = 0


def chosen(waiting: list[Task], home: int) -> Task:
    """The first that keeps to this process; else the last of the others."""
    place = next((i for i, task in enumerate(waiting) if task.cohort.home == home), len(waiting) - 1)
    task = waiting.pop(place)
    task.attempts += 1
    return task


def again(task: Task, error: object) -> Task:
    """To be done once more; raises `RunError` for one that was begun often enough."""
    if task.attempts == ATTEMPTS:
        names = f"{task.cohort.names[0]} … {task.cohort.names[-1]}"
        raise RunError(f"{ATTEMPTS} processes were lost over the devices {names}: {error}") from None
    return task
