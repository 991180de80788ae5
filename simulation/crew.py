"""A fleet with its devices in cohorts: what the driver asks of all of them, and how far they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulation.cohorts import pack
from simulation.fleet import Cohort, Done, Fleet, Job
from simulation.host import SimulatedDevices
from simulation.progress import Pulse


@dataclass(frozen=True)
class Crew:
    """`pulse` is told of each device that answered the server."""

    fleet: Fleet
    devices: SimulatedDevices
    pulse: Pulse = field(default_factory=Pulse)

    def cohorts(self, names: Sequence[str]) -> list[Cohort]:
        config = self.devices.run.config
        tokens = dict.fromkeys(names, 1.0)
        if self.fleet.size > 1:
            planned = {name: self.devices.planned(name) for name in names}
            tokens = {name: p.before + p.after for name, p in planned.items()}
        return pack(names, tokens, self.devices.run.shards, self.fleet.size, config.cohort_size)

    def map(self, job: Job, names: Sequence[str], shared: Any = None) -> Iterator[Done]:
        """The result of each cohort of these devices, as soon as there is one."""
        return self.fleet.map(job, self.cohorts(names), shared)

    def ask(self, job: Job, names: Sequence[str], shared: Any = None) -> Iterator[Done]:
        """As `map`, of what the server asks: it is told to whoever watches."""
        for cohort, result in self.map(job, names, shared):
            self.pulse.visit(len(cohort.names))
            yield cohort, result

    def gather(self, job: Job, names: Sequence[str], shared: Any = None) -> dict[str, Any]:
        """The results by device, of a job that returns them so or returns nothing."""
        found: dict[str, Any] = {}
        for _, result in self.map(job, names, shared):
            found |= result or {}
        return found

    def gather_arms(self, job: Job, names: Sequence[str], shared: Any = None) -> dict[str, dict[str, Any]]:
        """The results by arm and device."""
        found: dict[str, dict[str, Any]] = {}
        for _, result in self.map(job, names, shared):
            for arm, of_devices in result.items():
                found.setdefault(arm, {}).update(of_devices)
        return found
