"""Where a run's devices are computed, and the parts of a study or an audit: here, in others of this machine's
processes, or in Ray actors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import torch

from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.engines.processes import BYTES_OF_ONE, Count, ForkedWorkers, count_for, process_count
from florilegium.simulation.engines.ray_actors import Open, RayWorkers
from florilegium.simulation.engines.ray_cluster import Wish, open_cluster
from florilegium.simulation.engines.workers import Cohort, Done, Job, LocalWorkers, Told, Workers
from florilegium.simulation.runs.folder import RunFolder

log = logging.getLogger(__name__)


@contextmanager
def open_workers(run: RunFolder, devices: SimulatedDevices, opened: Open) -> Iterator[Workers]:
    """The processes that a run's config asks for, actors with what `opened` gives; they end with the context."""
    settings = run.config.ray
    if not settings.actors:
        with open_processes(devices, process_count(run.config, devices.context.lm.engine.device)) as processes:
            yield processes
        return
    wish = Wish(settings.actors, settings.cpus_per_actor, settings.gpus_per_actor)
    with open_cluster(run.path, wish, settings.address, settings.cpus_needed) as ray:
        began = time.perf_counter()
        workers = RayWorkers(ray, run, opened)
        log.info("%d actors after %.1f s", workers.homes, time.perf_counter() - began)
        yield workers


@contextmanager
def open_processes(devices: Told, count: int, *, patient: bool = True) -> Iterator[Workers]:
    """So many processes of this machine, or this one alone; they end with the context."""
    if count == 1:
        yield LocalWorkers(devices)
        return
    with closing(ForkedWorkers(devices, count, patient=patient)) as processes:
        yield processes


@dataclass(frozen=True)
class Means:
    """What the parts of some work may take: processes, a device, and the memory that each process needs."""

    workers: Count
    device: torch.device
    bytes_of_one: int = BYTES_OF_ONE

    def count(self, parts: int) -> int:
        """How many processes so many parts are given."""
        return min(parts, count_for(self.workers, parts, self.device, self.bytes_of_one))


def computed(work: Told, job: Job, parts: Sequence[Cohort], means: Means) -> Iterator[Done]:
    """Each part of some work with its result, as soon as there is one; several processes tell how many are done.

    On a CPU each part is computed by one thread, in however many processes, and so its bits are the same. What one of
    them raises is raised at once; what the others were at is lost.
    """
    done, listener, heard, count = 0, work.listener, work, means.count(len(parts))
    if listener and count > 1:
        heard = work.telling(lambda phase: listener(f"{done} of {len(parts)} parts done, {phase}"))
    places = [replace(part, home=part.home % count) for part in parts]
    with _one_thread(means.device), open_processes(heard, count, patient=False) as processes:
        for part, found in processes.map(job, places):
            done += 1
            yield part, found


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
