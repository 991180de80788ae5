"""Processes of this machine, forked from the driver: each has at once the model and the people that the driver has.

One begins within milliseconds and shares the driver's memory until it writes to it. Each computes with one thread, so
that nothing waits for another core within a product. One that is lost is replaced, and its cohort done again. Not
covered: systems without `fork`, and GPUs, whose contexts do not outlive one: there the driver or Ray's actors do all.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import psutil
import torch

from florilegium.privacy.common.environment import environment
from florilegium.privacy.common.errors import BrokenDeviceError
from florilegium.privacy.common.machine import cores, group_memory_left_bytes
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.engines.scheduler import cohort_size
from florilegium.simulation.engines.workers import ATTEMPTS, Cohort, Done, Job, Task, Told, again, chosen
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.stopping import end_with_parent

log = logging.getLogger(__name__)
WORK, NAMES = b"w", b"n"  # what a message to a process begins with
PHASE, DONE, RAISED = b"p", b"d", b"r"  # and one from it
BYTES_OF_ONE = 1 << 30  # that a process takes of its own: gradients and activations of a cohort of nano
Count = int | Literal["auto"]


def process_count(config: ExperimentConfig, device: torch.device) -> int:
    """How many processes a run is given: as many as there are cores, as its cohorts employ and as memory allows."""
    asked = config.data.users
    return count_for(config.workers, ceil(asked / cohort_size(config, asked)), device)


def count_for(wanted: Count, parts: int, device: torch.device, bytes_of_one: int = BYTES_OF_ONE) -> int:
    """How many processes so many parts of some work are given, where each needs so much memory of its own."""
    if device.type != "cpu" or not hasattr(os, "fork"):
        return 1
    if wanted != "auto":
        return wanted
    left = psutil.virtual_memory().available
    of_group = group_memory_left_bytes()
    room = int((left if of_group is None else min(left, of_group)) // bytes_of_one)
    return max(1, min(cores(), parts, room))


@dataclass
class Process:
    """A process, its number, and the cohort that it has at the moment."""

    home: int
    handle: BaseProcess
    pipe: Connection
    task: Task | None = None

    @property
    def pid(self) -> int:
        return self.handle.pid or 0


class ForkedWorkers:
    """So many processes, each with the devices that the driver has.

    Where a job fails, what others have begun comes to its end first, or with `patient=False` is left to `close`.
    """

    homes = 1

    def __init__(self, devices: Told, count: int, *, patient: bool = True) -> None:
        self.devices, self.patient = devices, patient
        self.lost = 0  # since a cohort last came back
        self.closed = False
        self.processes = [self._fork(home) for home in range(count)]

    def map(self, job: Job, cohorts: Sequence[Cohort], shared: Any = None) -> Iterator[Done]:
        work, waiting = pickle.dumps((job, shared)), [Task(cohort) for cohort in cohorts]
        knows: set[int] = set()  # processes that have this work
        try:
            self._begin(work, waiting, knows)
            while running := [p for p in self.processes if p.task]:
                for pipe in wait([p.pipe for p in running]):
                    process = next(p for p in running if p.pipe is pipe)
                    done = self._ended(process, waiting)
                    self._begin(work, waiting, knows)  # before the result is used: nobody waits meanwhile
                    if done:
                        yield done
        except Exception:
            if self.patient:
                self._settle()
            raise
        except BaseException:  # nobody listens any more, as after Ctrl-C
            self._drop()
            raise

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        self.closed = True
        for process in self.processes:
            process.task = None
            process.handle.kill()
        for process in self.processes:
            process.handle.join()
            process.pipe.close()

    def _begin(self, work: bytes, waiting: list[Task], knows: set[int]) -> None:
        """Gives cohorts to all who have none."""
        for process in self.processes:
            if process.task or not waiting:
                continue
            process.task = chosen(waiting, process.home)
            with suppress(OSError):  # it is gone: that is seen when its answer is waited for
                if process.pid not in knows:
                    process.pipe.send_bytes(WORK + work)
                    knows.add(process.pid)
                process.pipe.send_bytes(NAMES + pickle.dumps(process.task.cohort.names))

    def _ended(self, process: Process, waiting: list[Task]) -> Done | None:
        """What a process has said, if it is a cohort's result; the cohort of one that was lost waits again."""
        task = process.task
        assert task
        try:
            said = process.pipe.recv_bytes()
        except (EOFError, OSError):
            waiting.append(again(task, self._replaced(process)))
            return None
        if said.startswith(PHASE):
            if process.home == 0 and self.devices.listener:  # the others are about as far
                self.devices.listener(pickle.loads(said.removeprefix(PHASE)))
            return None
        process.task = None
        found = pickle.loads(said[1:])
        if said.startswith(RAISED):
            raise found
        self.lost = 0
        return task.cohort, found

    def _drop(self) -> None:
        """Others in the place of processes whose work nobody waits for."""
        for process in list(self.processes):
            if process.task and not self.closed:
                self._renew(process)

    def _replaced(self, process: Process) -> str:
        """Puts another in the place of one that was lost, and counts; how that ended."""
        self._renew(process)
        how = f"exit code {process.handle.exitcode}"
        log.warning("a process with devices was lost (%s): its work is done again", how)
        self.lost += 1
        if self.lost > ATTEMPTS * len(self.processes):
            raise RunError(f"{self.lost} processes were lost, one after the other; the last: {how}")
        return how

    def _renew(self, process: Process) -> None:
        """Another in its place; it may live on, where only its pipe was lost or its work is not wanted."""
        process.handle.kill()
        process.handle.join()
        process.pipe.close()
        self.processes[self.processes.index(process)] = self._fork(process.home)

    def _settle(self) -> None:
        """Work that was begun beside what has failed comes to its end, and is stored."""
        for process in self.processes:
            with suppress(EOFError, OSError):
                while process.task and process.pipe.recv_bytes().startswith(PHASE):
                    pass
            process.task = None

    def _fork(self, home: int) -> Process:
        ours, its = multiprocessing.Pipe()
        # Threads of tokenizers are not waited for there; others, of which Python warns, hold no lock of a pass.
        with environment("TOKENIZERS_PARALLELISM", "false"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            handle = multiprocessing.get_context("fork").Process(
                target=_serve, args=(its, self.devices, os.getpid()), name=f"devices-{home}", daemon=True
            )
            handle.start()
        its.close()
        return Process(home, handle, ours)


def _serve(pipe: Connection, devices: Told, driver: int) -> None:
    """A process's life: a job and what it shares, then the names of one cohort after another, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to hear
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(driver)
    torch.set_num_threads(1)
    own = devices.telling(lambda phase: _tell(pipe, PHASE, phase))
    work, job, shared = b"", None, None
    with suppress(EOFError, OSError):
        while True:
            said = pipe.recv_bytes()
            if said.startswith(WORK):
                work, job = said.removeprefix(WORK), None
                continue
            try:
                if job is None:
                    job, shared = pickle.loads(work)
                _tell(pipe, DONE, job(own, pickle.loads(said.removeprefix(NAMES)), shared))
            except BaseException as error:  # noqa: BLE001  # is raised by the driver
                _tell(pipe, RAISED, _sent(error))


def _tell(pipe: Connection, what: bytes, found: Any) -> None:
    pipe.send_bytes(what + pickle.dumps(found))


def _sent(error: BaseException) -> Exception:
    """What was raised, with its traceback here; of a kind that cannot be sent, or ends a process, its text."""
    told = "".join(traceback.format_exception(error))
    if not isinstance(error, Exception):
        return RuntimeError(told)
    if not isinstance(error, BrokenDeviceError):  # which has its traceback with it
        error.add_note(f"raised in another process:\n{told}")
    try:
        found: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever its constructor wants
        return RuntimeError(told)
    return found
