"""Ray actors on one machine or on a cluster, each with the base model in it, that do the work of cohorts."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from florilegium.privacy.common.errors import BrokenDeviceError
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.engines.workers import ATTEMPTS, Cohort, Done, Job, Task, again, chosen
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.folder import RunFolder

log = logging.getLogger(__name__)
Open = Callable[[Path], SimulatedDevices]
START_TIMEOUT_S = 600.0


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
    def homes(self) -> int:
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
            task = chosen(waiting, actor.home)
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
            waiting.append(again(task, error))
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
        if self.lost > ATTEMPTS * self.homes:
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
