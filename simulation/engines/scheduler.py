"""Devices in cohorts: who is computed with whom, what the driver asks of all of them, and which have failed.

Cohorts are packed so that all processes finish together. A device keeps to the process that its shard belongs to; some
move from the process with the most predicted work to the one with the least. Not covered: how fast a process is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any

from florilegium.client.flower_replies import refusal
from florilegium.privacy.reply_gate import FAILED
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.engines.faults import Failure, TooManyFailedError, attempt, left
from florilegium.simulation.engines.workers import Cohort, Done, Job, Workers
from florilegium.simulation.runs.device_store import Shards
from florilegium.simulation.runs.progress import RunProgress

LEAST = 16  # devices in a cohort: a pass of fewer is slower on one core
PARTS = 32  # cohorts of what is asked at once, if they are large enough: work for as many processes
ASKED_FOR = {"released": "release", "adopted": "adoption", "learn_without_server": "control"}  # by the job


@dataclass(frozen=True)
class Scheduler:
    """`progress` is told of each device that answered the server."""

    workers: Workers
    devices: SimulatedDevices
    progress: RunProgress = field(default_factory=RunProgress)
    failures: list[Failure] = field(default_factory=list)  # that nobody has taken yet
    asked: Counter[str] = field(default_factory=Counter)  # devices, by what they were asked for, since then

    def cohorts(self, names: Sequence[str]) -> list[Cohort]:
        config = self.devices.run.config
        tokens = dict.fromkeys(names, 1.0)
        homes, size = self.workers.homes, cohort_size(config, len(names))
        if homes > 1:
            planned = {name: self.devices.planned(name) for name in names}
            tokens = {name: p.before + p.after for name, p in planned.items()}
        return pack(names, tokens, self.devices.run.shards, homes, size)

    def map(self, job: Job, names: Sequence[str], shared: Any = None) -> Iterator[Done]:
        """The result of each cohort of these devices, as soon as there is one.

        Without those that failed, where that is counted.
        """
        what = ASKED_FOR.get(job.__name__, "evaluation")
        careful = partial(attempt, job, self.devices.run.config.engine.on_device_error == "count")
        self.asked[what] += len(names)
        for cohort, found in self.workers.map(careful, self.cohorts(names), shared):
            self.failures.extend(Failure(device, what, error) for device, error in found.failed.items())
            for some, result in found.results:
                yield Cohort(some, cohort.home), result

    def taken(self) -> list[Failure]:
        """The failures since the last call."""
        failures = list(self.failures)
        self.failures.clear()
        self.asked.clear()
        return failures

    def check(self) -> None:
        """Raises `TooManyFailedError` where more have failed since `taken` than is allowed of one kind.

        And what another process has left that is not to be counted.
        """
        self.failures.extend(left(self.devices.run.faults))
        config = self.devices.run.config
        share = config.engine.failed_share
        for what, failed in Counter(f.what for f in self.failures).items():
            asked = self.asked[what] or config.data.users
            if failed > share * asked or failed == asked:
                first = next(f for f in self.failures if f.what == what)
                raise TooManyFailedError(
                    f"{what} failed on {failed} of {asked} devices; engine.failed_share = {share:g} is the most that "
                    f"may; the first, {first.device}: {first.error}"
                )

    def ask(self, job: Job, names: Sequence[str], shared: Any = None) -> Iterator[Done]:
        """As `map`, of what the server asks, told to whoever watches. A device that failed answers that it did."""
        before = len(self.failures)
        for cohort, result in self.map(job, names, shared):
            self.progress.visit(len(cohort.names))
            yield cohort, result
        failed = tuple(f.device for f in self.failures[before:])
        if failed:
            yield Cohort(failed), [(name, refusal(FAILED)) for name in failed]

    def gather(self, job: Job, names: Sequence[str], shared: Any = None) -> dict[str, Any]:
        """The results by device, of a job that returns them so or returns nothing."""
        found: dict[str, Any] = {}
        for _, result in self.map(job, names, shared):
            found |= result or {}
        self.check()
        return found

    def gather_arms(self, job: Job, names: Sequence[str], shared: Any = None) -> dict[str, dict[str, Any]]:
        """The results by arm and device."""
        found: dict[str, dict[str, Any]] = {}
        for _, result in self.map(job, names, shared):
            for arm, of_devices in result.items():
                found.setdefault(arm, {}).update(of_devices)
        self.check()
        return found


def cohort_size(config: ExperimentConfig, asked: int) -> int:
    """Devices in one pass where so many are asked at once. The number of processes has no part in it."""
    return min(config.cohort_size, max(LEAST, ceil(asked / PARTS)))


def pack(names: Sequence[str], tokens: Mapping[str, float], shards: Shards, homes: int, size: int) -> list[Cohort]:
    """Cohorts of at most `size` devices for so many homes, at each home in the order of the names, moved ones last."""
    at_home: list[list[str]] = [[] for _ in range(homes)]
    for name in names:
        at_home[shards.of(name) % homes].append(name)
    _level(at_home, tokens)
    return [
        Cohort(tuple(some[i : i + size]), home)
        for home, some in enumerate(at_home)
        for i in range(0, len(some), size)
    ]  # fmt: skip


def _level(at_home: list[list[str]], tokens: Mapping[str, float]) -> None:
    """Evens out the homes: from the one with most to the one with least, the device that is nearest to half the gap.

    It ends when no device is smaller than the gap; then the gap is at most the largest device. A move makes the sum
    of the loads' squares smaller, so there is an end.
    """
    loads = [sum(tokens[n] for n in some) for some in at_home]
    while True:
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[heavy] - loads[light]
        fits = [name for name in at_home[heavy] if 0 < tokens[name] < gap]
        if not fits:
            return
        name = min(fits, key=lambda n: (abs(tokens[n] - gap / 2), n))
        at_home[heavy].remove(name)
        at_home[light].append(name)
        loads[heavy] -= tokens[name]
        loads[light] += tokens[name]
