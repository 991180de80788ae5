"""Simulated devices: real people's streams behind the same client code that a board runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from client.lm.model import LanguageModel
from client.phases import Observation, Site, States
from client.round import adopt, contribute
from client.shared import resend
from client.state import DeviceState, stage
from privacy.ledger import Ledger
from privacy.plan import RoundPlan
from privacy.release import Release, Schema
from simulation.data.population import User, load_population
from simulation.runs import RunError, RunFolder, check_sources

CONTRIBUTED = "a-contributed"


def device_name(index: int) -> str:
    """A device's name follows from its place in the population; the user's id stays out of file names."""
    return f"device-{index:05d}"


@dataclass(frozen=True)
class SimulatedDevices:
    """All devices of a run, as far as this process is asked for them (`client.app.Devices`)."""

    run: RunFolder
    site: Site
    users: dict[str, User]  # by device name

    @property
    def schema(self) -> Schema:
        return self.site.schema

    def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Release | None]:
        """Everything before the aggregation; the states are stored before a release is handed out.

        None for a device that does not release: its budget is spent, or this round is over for it.
        """
        finished = stage(plan.round, CONTRIBUTED)
        again = {n: self.state(n) for n in names if self.run.devices.latest(n) == finished}
        releases = {n: resend(s, received, plan, self.schema) for n, s in again.items()}
        for cohort in self._cohorts([n for n in names if n not in again]):
            states = [s for s in (self._before(name, plan) for name in cohort) if s]
            if not states:
                continue
            arrived = [self.users[s.id].stream[s.arrived : self._until(s.id, plan.round)] for s in states]
            states, sent, pages = contribute(states, arrived, received, plan, self.site)
            self._keep(states, finished, pages)
            releases |= {s.id: r for s, r in zip(states, sent, strict=True)}
        return [releases.get(name) for name in names]

    def _before(self, name: str, plan: RoundPlan) -> DeviceState | None:
        """A device as it enters a round; None for a round that is not planned, or before one that it has finished."""
        newest = self.run.devices.latest(name)
        if not 1 <= plan.round <= self.site.config.rounds or (newest and newest > stage(plan.round)):
            return None
        last = self.state(name)
        if not newest:
            self.run.devices.save([last], stage(0))  # its secret, before anything is paid for with it
        return replace(self.state(name, plan.round - 1), secret=last.secret, head=last.head)

    def adopt(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> None:
        """Personal learning on the aggregated adapter; ends the round for these devices."""
        for cohort in self._cohorts(names):
            states = [self.run.devices.load(name, stage(plan.round, CONTRIBUTED)) for name in cohort]
            states, pages = adopt(states, received, plan, self.site)
            self._keep(states, stage(plan.round), pages)
            for name in cohort:
                self.run.devices.forget(name, until=stage(plan.round - 1))

    def state(self, name: str, round_number: int | None = None) -> DeviceState:
        """A device as it is, or as it was at the end of a round or of the last one before that it took part in."""
        found = self.run.devices.latest(name, None if round_number is None else stage(round_number))
        return self.run.devices.load(name, found) if found else self.site.new_state(name)

    def _until(self, name: str, round_number: int) -> int:
        """How much of its stream a device has met by a round: equal parts over the run."""
        return round(len(self.users[name].stream) * round_number / self.site.config.rounds)

    def _cohorts(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        size = self.run.config.cohort_size
        return (names[i : i + size] for i in range(0, len(names), size))

    def _keep(self, states: States, at: str, pages: list[Observation]) -> None:
        self.run.devices.save(states, at)
        for state, page in zip(states, pages, strict=True):
            self.run.note(state.id, at, page)


def open_devices(run: RunFolder, listener: Callable[[str], None] | None = None) -> SimulatedDevices:
    """Loads population and model of a run; raises what their loaders raise."""
    config = run.config
    users = {device_name(i): user for i, user in enumerate(load_population(config.data, config.seed))}
    recorded = recorded_replies(users, config.data.name)
    lm = LanguageModel.load(config.model)
    site = Site.of(
        lm, config, config.seed, lambda device, dialogue: recorded[device][dialogue], listener, Ledger(run.ledger)
    )
    return SimulatedDevices(run, site, users)


def recorded_replies(users: Mapping[str, User], data: str) -> dict[str, dict[str, str]]:
    """By device and dialogue the reply that the person wrote, which stands for what they would annotate."""
    recorded = {name: {d.id: d.response for d in user.stream} for name, user in users.items()}
    for name, user in users.items():
        if len(recorded[name]) < len(user.stream):
            raise RunError(f"user {user.id} of {data} has two replies with the same id")
    return recorded


@lru_cache(maxsize=1)
def devices_of_worker(folder: Path) -> SimulatedDevices:
    """The devices of a run in a worker process, loaded once; refuses to run other code than the driver's."""
    run = RunFolder(folder)
    check_sources(run)
    return open_devices(run)
