"""Where a run's devices are computed: in this process, in others of this machine, or in Ray actors."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.engines.processes import ForkedWorkers, process_count
from florilegium.simulation.engines.ray_actors import Open, RayWorkers
from florilegium.simulation.engines.ray_cluster import Wish, open_cluster
from florilegium.simulation.engines.workers import LocalWorkers, Workers
from florilegium.simulation.runs.folder import RunFolder

log = logging.getLogger(__name__)


@contextmanager
def open_workers(run: RunFolder, devices: SimulatedDevices, opened: Open) -> Iterator[Workers]:
    """The processes that a run's config asks for, actors with what `opened` gives; they end with the context."""
    settings = run.config.ray
    if not settings.actors:
        count = process_count(run.config, devices.context.lm.engine.device)
        if count == 1:
            yield LocalWorkers(devices)
            return
        with closing(ForkedWorkers(devices, count)) as processes:
            yield processes
        return
    wish = Wish(settings.actors, settings.cpus_per_actor, settings.gpus_per_actor)
    with open_cluster(run.path, wish, settings.address, settings.cpus_needed) as ray:
        began = time.perf_counter()
        workers = RayWorkers(ray, run, opened)
        log.info("%d actors after %.1f s", workers.homes, time.perf_counter() - began)
        yield workers
