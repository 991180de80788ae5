"""The processes that a simulation's devices live in: this one, or Ray actors on one machine or on a cluster.

A job is a function of a module, `job(devices, names, shared)`, that is done for one cohort after another, in any
order, each by one process; what they have in common is sent once. A process that is lost takes no result with it: its
cohort is done again by another. Every process holds the base model once.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from florilegium.privacy.common.errors import BrokenDeviceError
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.engines.ray_cluster import Wish, open_cluster
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.folder import RunFolder

log = logging.getLogger(__name__)
Job = Callable[..., Any]  # (devices, names, shared); of a module: another process finds it by its name
Open = Callable[[Path], SimulatedDevices]
ATTEMPTS = 4  # of a cohort whose processes are lost: then it is the cohort that ends them
START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Cohort:
    """Devices that are computed together, and the number of the process that they keep to while it has time."""

    names: tuple[str, ...]
    home: int = 0


Done = tuple[Cohort, Any]


class Workers(Protocol):
    """Where jobs are done."""

    @property
    def size(self) -> int: ...

    def map(self, job: Job, cohorts: Sequence[Cohort], shared: Any = None) -> Iterator[Done]:
        """Each cohort with its result, as soon as there is one."""


@dataclass(frozen=True)
class LocalWorkers:
    """All devices in this process."""

    devices: SimulatedDevices

    @property
    def size(self) -> int:
        return 1

    def map(self, job: Job, cohorts: Sequence[Cohort], shared: Any = None) -> Iterator[Done]:
        return ((cohort, job(self.devices, cohort.names, shared)) for cohort in cohorts)


class Worker:
    """One process of a cluster, with the base model in it."""

    devices: SimulatedDevices

    def begin(self, folder: Path, threads: int, opened: Open) -> int:
        """Not done by the constructor: what that raises Ray takes for a process that was lost."""
        import torch

        torch.set_num_threads(threads)
        self.devices = opened(folder)
        return os.getpid()

    def do(self, job: Job, names: Sequence[str], shared: Any) -> Any:
        return job(self.devices, names, shared)


@dataclass(frozen=True, slots=True)
class Actor:
    """A Ray actor, the home that it is, and its process."""

    handle: Any
    home: int
    pid: int = 0


@dataclass
class Task:
    """A cohort's work, and how often it was begun."""

    cohort: Cohort
    attempts: int = 0


class RayWorkers:
    """`config.ray.actors` Ray actors. One that is lost is replaced while the cluster has room; else the rest go on."""

    def __init__(self, ray: Any, run: RunFolder, opened: Open) -> None:
        self.ray, self.run, self.opened, self.settings = ray, run, opened, run.config.ray
        self.starting: dict[Any, Actor] = {}  # by the reference of `begin`
        self.idle: list[Actor] = []
        self.lost = 0  # since a cohort last came back
        for home in range(self.settings.actors):
            self._start(home)
        while not self.idle:
            for reference in self._done(list(self.starting)):
                self._welcome(reference)

    @property
    def size(self) -> int:
        return self.settings.actors

    def map(self, job: Job, cohorts: Sequence[Cohort], shared: Any = None) -> Iterator[Done]:
        common, waiting = self.ray.put(shared), [Task(cohort) for cohort in cohorts]
        running: dict[Any, tuple[Actor, Task]] = {}  # by the reference of the result
        try:
            self._begin(job, common, waiting, running)
            while waiting or running:
                for reference in self._done([*running, *self.starting]):
                    done = self._ended(reference, waiting, running)
                    self._begin(job, common, waiting, running)  # before the result is used: nobody waits meanwhile
                    if done:
                        yield done
        except (Exception, GeneratorExit):  # but Ctrl-C does not wait
            self._settle(running)
            raise

    def _begin(self, job: Job, common: Any, waiting: list[Task], running: dict[Any, tuple[Actor, Task]]) -> None:
        """Gives work to all who have none."""
        while waiting and self.idle:
            actor = self.idle.pop()
            task = _chosen(waiting, actor.home)
            running[actor.handle.do.remote(job, task.cohort.names, common)] = actor, task

    def _ended(
        self, reference: Any, waiting: list[Task], running: dict[Any, tuple[Actor, Task]]
    ) -> tuple[Cohort, Any] | None:
        """What came of a reference that is done, if it is a cohort's result; one that was lost waits again."""
        if reference in self.starting:
            self._welcome(reference)
            return None
        actor, task = running.pop(reference)
        try:
            result = self._result(reference)
        except self.ray.exceptions.RayError as error:
            self._lose(actor, error)
            waiting.append(_again(task, error))
            return None
        except Exception:
            self.idle.append(actor)
            raise
        self.idle.append(actor)
        self.lost = 0
        return task.cohort, result

    def _result(self, reference: Any) -> Any:
        """Raises what the job raised, or another of Ray's errors where its process, or what it sent, is gone."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise _raised_there(error) from None

    def _done(self, references: list[Any]) -> list[Any]:
        """Those of the references that are done; at least one."""
        done, _ = self.ray.wait(references, timeout=START_TIMEOUT_S if len(references) == len(self.starting) else None)
        if not done:
            raise RunError(
                f"no actor with {self._wish} began within {START_TIMEOUT_S:.0f} s; lower [ray], or add nodes"
            )
        found: list[Any] = done
        return found

    @property
    def _wish(self) -> str:
        return (
            f"ray.cpus_per_actor = {self.settings.cpus_per_actor} and gpus_per_actor = {self.settings.gpus_per_actor}"
        )

    def _start(self, home: int) -> None:
        remote: Any = self.ray.remote(
            num_cpus=self.settings.cpus_per_actor, num_gpus=self.settings.gpus_per_actor, scheduling_strategy="SPREAD"
        )(Worker)
        handle, threads = remote.remote(), max(1, int(self.settings.cpus_per_actor))
        self.starting[handle.begin.remote(self.run.path, threads, self.opened)] = Actor(handle, home)

    def _welcome(self, reference: Any) -> None:
        actor = self.starting.pop(reference)
        try:
            self.idle.append(replace(actor, pid=self._result(reference)))
        except self.ray.exceptions.RayActorError as error:
            if error.actor_init_failed:  # our code cannot be imported there: another process would fail alike
                raise RunError(f"a process with devices cannot begin: {_plain(error).splitlines()[-1]}") from error
            self._lose(actor, error)
        except self.ray.exceptions.RayError as error:
            self._lose(actor, error)

    def _lose(self, actor: Actor, error: Exception) -> None:
        log.warning("a process with devices was lost (%s): its work is done again", type(error).__name__)
        self.lost += 1
        if self.lost > ATTEMPTS * self.size:
            raise RunError(f"{self.lost} processes were lost, one after the other; the last: {error}") from None
        self.ray.kill(actor.handle)  # lives on where only its result was lost
        self._start(actor.home)

    def _settle(self, running: dict[Any, tuple[Actor, Task]]) -> None:
        """Work that nobody waits for any more ends before the actors are used again."""
        if running:
            self.ray.wait(list(running), num_returns=len(running), timeout=60)
        self.idle += [actor for actor, _ in running.values()]


def _raised_there(error: Any) -> Exception:
    """What was raised in another process, with its traceback there."""
    if not isinstance(error.cause, Exception):  # of a kind that cannot be sent
        return RuntimeError(_plain(error))
    found: Exception = error.cause
    if isinstance(found, BrokenDeviceError):  # which has its traceback with it
        return found
    found.add_note(f"raised in another process:\n{_plain(error)}")
    return found


def _plain(error: Exception) -> str:
    """Without Ray's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))


def _chosen(waiting: list[Task], home: int) -> Task:
    """The first that keeps to this process; else the last of the others."""
    place = next((i for i, task in enumerate(waiting) if task.cohort.home == home), len(waiting) - 1)
    task = waiting.pop(place)
    task.attempts += 1
    return task


def _again(task: Task, error: Exception) -> Task:
    if task.attempts == ATTEMPTS:
        names = f"{task.cohort.names[0]} … {task.cohort.names[-1]}"
        raise RunError(f"{ATTEMPTS} processes were lost over the devices {names}: {error}") from None
    return task


@contextmanager
def open_workers(run: RunFolder, devices: SimulatedDevices, opened: Open) -> Iterator[Workers]:
    """The processes that a run's config asks for, each with what `opened` gives; they end with the context."""
    settings = run.config.ray
    if not settings.actors:
        yield LocalWorkers(devices)
        return
    wish = Wish(settings.actors, settings.cpus_per_actor, settings.gpus_per_actor)
    with open_cluster(run.path, wish, settings.address, settings.cpus_needed) as ray:
        began = time.perf_counter()
        workers = RayWorkers(ray, run, opened)
        log.info("%d actors after %.1f s", workers.size, time.perf_counter() - began)
        yield workers
