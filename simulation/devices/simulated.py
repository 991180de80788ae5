"""Simulated devices: real people's streams behind the same client code that a board runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from shutil import rmtree
from typing import Literal

import torch

from florilegium.client.context import CohortContext
from florilegium.client.lm.model import LanguageModel
from florilegium.client.observation import Observation
from florilegium.client.private_training import resend
from florilegium.client.round import adopt, contribute, stay
from florilegium.client.secure_sessions import FolderSessions, Sessions
from florilegium.client.state import DeviceState, States, stage
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Schema
from florilegium.privacy.secure_aggregation.part import Sendable
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.population import User, met_by
from florilegium.simulation.devices.inputs import agree
from florilegium.simulation.devices.people import UsersByDevice
from florilegium.simulation.devices.preflight import everybody, world_of
from florilegium.simulation.devices.workload import TokenWorkload, planned_tokens
from florilegium.simulation.heterogeneity.classes import DevicePopulation, class_of
from florilegium.simulation.runs.device_store import ShardedStore
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.settings import ConfigError

SESSIONS = "sessions"  # of secure aggregation, in a run's folder
CONTRIBUTED = "a-contributed"
Own = Literal["beside", "alone", "none"]  # how what stays on a device is on: with the shared adapter, without it, never


@dataclass(frozen=True)
class RoundFunctions:
    """What a cohort does before and after an aggregation: `client.round`, unless what is measured is the rest."""

    contribute: Callable[..., tuple[States, list[Sendable | None], list[Observation]]] = contribute
    adopt: Callable[..., tuple[States, list[Observation]]] = adopt
    own: Own = "beside"


WITHOUT_SERVER = RoundFunctions(  # without a server
    contribute=lambda states, arrived, received, plan, context: stay(states, arrived, plan, context),
    adopt=lambda states, received, plan, context: adopt(states, None, plan, context),
    own="alone",
)


@dataclass(frozen=True)
class SimulatedDevices:
    """All devices of a run, as far as this process is asked for them (`client.devices.Devices`)."""

    run: RunFolder
    context: CohortContext
    users: UsersByDevice
    duties: RoundFunctions = field(default_factory=RoundFunctions)
    world: DevicePopulation | None = None
    sessions: Sessions | None = None  # those of secure aggregation, where each device is a process of its own
    _planned: dict[str, TokenWorkload] = field(default_factory=dict, repr=False)

    @property
    def schema(self) -> Schema:
        return self.context.schema

    @property
    def summed(self) -> bool:
        """Whether releases are parts of a sum."""
        return self.context.config.privacy.distributed

    @property
    def listener(self) -> Callable[[str], None] | None:
        return self.context.listener

    def telling(self, listener: Callable[[str], None]) -> SimulatedDevices:
        """The same devices, whose phases somebody else is told of."""
        return replace(self, context=replace(self.context, listener=listener))

    def planned(self, name: str) -> TokenWorkload:
        """What a device will compute in a round."""
        if name not in self._planned:
            self._planned[name] = planned_tokens(self.users[name], self.run.config)
        return self._planned[name]

    @property
    def store(self) -> ShardedStore:
        return self.run.shards.states

    def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Sendable | None]:
        """Everything before the aggregation, for one cohort; states are stored before a release is handed out.

        None for a device that does not release: its budget is spent, or this round is over for it. After a kill the
        whole cohort is computed again, so that every device has the company that it had; what was stored stays.
        """
        finished, stages = stage(plan.round, CONTRIBUTED), self.store.stages(names)
        planned = [n for n in names if 1 <= plan.round <= self.context.config.rounds and stages[n] <= stage(plan.round)]
        again = [n for n in planned if stages[n] >= finished]
        releases: dict[str, Sendable | None] = {}
        if again != planned and stage(plan.round) not in stages.values():
            states = self._before(planned, plan, again)
            arrived = [self.users[s.id].stream[s.arrived : self._until(s.id, plan.round)] for s in states]
            states, sent, seen = self.duties.contribute(states, arrived, received, plan, self.context)
            again = again + self._keep(states, finished, seen, but=again)
            releases = {s.id: r for s, r in zip(states, sent, strict=True)}
        for name, found in self.store.find(again, finished).items():
            assert found
            releases[name] = resend(found[1], received, plan, self.context)
        return [releases.get(name) for name in names]

    def _before(self, names: Sequence[str], plan: RoundPlan, again: Sequence[str]) -> States:
        """The devices as they enter a round; one that has been in it pays with what it has since learned."""
        round_before = plan.round - 1
        found = self.store.find(names, stage(round_before))
        new = [self.context.new_state(n) for n in names if found[n] is None]
        if new and self.context.config.privacy.secret == "os":
            there = self.store.save(new, stage(0))  # their secrets, before anything is paid for with them
            found |= self.store.find(there, stage(round_before))  # drawn by another process, which was quicker
        states = {s.id: s for s in new} | {n: at[1] for n, at in found.items() if at}
        for name, last in self.store.find(again).items():
            assert last
            states[name] = replace(states[name], secret=last[1].secret, head=last[1].head)
        return [states[n] for n in names]

    def adopt(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> None:
        """Personal learning on the aggregated adapter; ends the round for those of the devices that took part."""
        over, stages = stage(plan.round), self.store.stages(names)
        took_part = [n for n in names if stage(plan.round, CONTRIBUTED) <= stages[n] <= over]
        done = [n for n in took_part if stages[n] == over]
        if done == took_part:
            return
        found = self.store.find(took_part, stage(plan.round, CONTRIBUTED))
        states, seen = self.duties.adopt([at[1] for at in found.values() if at], received, plan, self.context)
        self._keep(states, over, seen, but=done)

    def state(self, name: str, round_number: int | None = None) -> DeviceState:
        """A device as it is, or as it was at the end of a round or of the last one before that it took part in."""
        return self.states([name], round_number)[0]

    def states(self, names: Sequence[str], round_number: int | None = None) -> States:
        """As `state`, of many devices."""
        found = self.store.find(names, *([] if round_number is None else [stage(round_number)]))
        return [at[1] if (at := found[n]) else self.context.new_state(n) for n in names]

    def observations(self, names: Sequence[str], round_number: int) -> dict[str, Observation]:
        """What was seen of each device in a round; nothing of one that did not come through."""
        found = self.store.observations(names, stage(round_number, ""), stage(round_number))
        return {name: reduce(Observation.joined, seen, Observation()) for name, seen in found.items()}

    def _until(self, name: str, round_number: int) -> int:
        return met_by(len(self.users[name].stream), round_number, self.context.config.rounds)

    def _keep(self, states: States, at: str, seen: list[Observation], but: Sequence[str]) -> list[str]:
        """Stores what is not there; returns the devices for which another process was quicker."""
        kept = [(s, p) for s, p in zip(states, seen, strict=True) if s.id not in but]
        return self.store.save([s for s, _ in kept], at, [p for _, p in kept])


def load_devices(
    run: RunFolder, listener: Callable[[str], None] | None = None, people: Sequence[User] | None = None
) -> SimulatedDevices:
    """Loads population (unless it is given) and model of a run; raises what their loaders raise.

    And `RunError` where they have changed.
    """
    config = run.config
    population = everybody(config) if people is None else people
    agree(run, population)
    users = UsersByDevice(population)
    lm = LanguageModel.load(config.model)
    kept = _without_pool(config) if config.server.absent else config
    context = CohortContext.of(lm, kept, config.seed, users.reply, listener, run.shards.ledger)
    if config.server.absent:
        return SimulatedDevices(run, context, users, WITHOUT_SERVER)
    sessions = FolderSessions(context, folder=run.path / SESSIONS) if config.privacy.distributed else None
    world = world_of(config)
    if world is None:
        return SimulatedDevices(run, context, users, sessions=sessions)
    if sessions and any(c.rank for c in world.classes):
        raise ConfigError(f"world.classes: a class with a rank of its own has no part in {config.privacy.mode!r} sums")
    context = replace(context, rank_of=partial(rank_in, world))
    return SimulatedDevices(run, context, users, world=world, sessions=sessions)


def _without_pool(config: ExperimentConfig) -> ExperimentConfig:
    """No server: nothing is kept and annotated for its sake."""
    return config.model_copy(update={"shared": config.shared.model_copy(update={"pool_capacity": 0})})


def rank_in(world: DevicePopulation, device: str) -> int:
    """Of the shared adapter that the device's class has room for; 0: all of it."""
    return class_of(device, world.classes, world.seed).rank


def forget_sessions(run: RunFolder) -> None:
    """Before a run begins or goes on: a round that was not finished is played again."""
    rmtree(run.path / SESSIONS, ignore_errors=True)
