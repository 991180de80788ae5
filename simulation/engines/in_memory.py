"""A whole federation in memory, for studies and audits: the devices' and the server's own code, Flower's messages
between them, and of the devices nothing on the disk but their ledger. Not covered: evaluation, resuming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from flwr.app import Message

from florilegium.client.calibration import sum_code
from florilegium.client.coins import Coins
from florilegium.client.config import DeviceConfig
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.flower_replies import DeviceReply, Instruction, part_reply
from florilegium.client.lm.model import LanguageModel
from florilegium.client.observation import Observation
from florilegium.client.round import contribute
from florilegium.client.secure_sessions import Sessions, SimulatedSessions
from florilegium.client.state import DeviceState
from florilegium.privacy.ledger import Ledger
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Schema
from florilegium.privacy.secure_aggregation.part import Sendable, SumPart
from florilegium.privacy.secure_aggregation.rounded_noise import SumCode
from florilegium.server.config import ServerConfig
from florilegium.server.release_collector import Limits, RoundFacts
from florilegium.simulation.data.population import met_by
from florilegium.simulation.engines.cohort_grid import CohortGrid
from florilegium.simulation.engines.faults import tried
from florilegium.simulation.engines.strategy import new_strategy
from florilegium.simulation.engines.workers import Cohort, Done, Job
from florilegium.simulation.rounds import Recorder, federate
from florilegium.simulation.settings import ConfigError


@dataclass
class InMemory:
    """All devices of a federation (`client.devices.Devices`), and what left them."""

    context: CohortContext
    streams: Mapping[str, Sequence[Dialogue]]
    at_once: bool = False  # whether all of a stream is there in the first round, or equal parts of it in each
    states: dict[str, DeviceState] = field(default_factory=dict)
    observations: list[dict[str, Observation]] = field(default_factory=list)  # by round and device
    received: list[torch.Tensor] = field(default_factory=list)  # by round, (P,): before it
    changes: list[torch.Tensor] = field(default_factory=list)  # by round, (K, P); zero for one that sent nothing

    def __post_init__(self) -> None:
        self.states = {name: self.context.new_state(name) for name in self.streams}

    @property
    def schema(self) -> Schema:
        return self.context.schema

    @property
    def summed(self) -> bool:
        """Whether releases are parts of a sum."""
        return self.context.config.privacy.distributed

    @property
    def sessions(self) -> Sessions | None:
        """Their engine's."""
        return None

    def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Sendable | None]:
        arrived = [self.streams[n][self.states[n].arrived : self._until(n, plan.round)] for n in names]
        states, releases, seen = contribute([self.states[n] for n in names], arrived, received, plan, self.context)
        self.states |= {s.id: s for s in states}
        self.observations.append(dict(zip(names, seen, strict=True)))
        self.received.append(received)
        sent = {n: r for n, r in zip(names, releases, strict=True) if r}
        self.changes.append(torch.from_numpy(np.stack([self._row(sent.get(n), plan.round) for n in self.streams])))
        return releases

    def adopt(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> None:
        """Nothing: personal adapters are trained after the last round, where they are wanted."""

    def sent(self, index: int) -> torch.Tensor:
        """(devices that released, P): what they did in the round with this index."""
        seen = self.observations[index]
        return self.changes[index][[bool(n in seen and seen[n].upload_bytes) for n in self.streams]]

    def _until(self, name: str, number: int) -> int:
        length = len(self.streams[name])
        return length if self.at_once else met_by(length, number, self.context.config.rounds)

    def _row(self, release: Sendable | None, number: int) -> np.ndarray:
        row, schema = np.zeros(self.context.shared_layout.width, np.float32), self.context.schema
        if isinstance(release, SumPart):
            row[schema.places(number)] = self.code(number).decoded(release.numbers)
        elif release:
            row[schema.places(number)] = schema.of_round(number).join(release.arrays)
        return row

    def code(self, number: int) -> SumCode:
        """How numbers of a round become integers."""
        return sum_code(self.context.config, self.schema, number, self.context.seed)


class RecordingGrid(CohortGrid):
    """All devices in one cohort; keeps what they reply, as it is before it goes onto a wire.

    Parts of a sum are `masked` as devices do it, or sent as they are: the sum is the same.
    """

    def __init__(self, devices: InMemory, names: Sequence[str], *, masked: bool) -> None:
        sessions = SimulatedSessions(devices.context) if devices.summed and masked else None
        super().__init__(self._at_once, devices.schema, names, sessions)
        self.devices = devices
        self.sent: list[Message] = []

    def _at_once(self, job: Job, names: Sequence[str], shared: Any) -> Iterator[Done]:
        yield Cohort(tuple(names)), tried(lambda some: job(self.devices, [names[k] for k in some], shared), names)

    def _reply(self, given: DeviceReply | SumPart, question: Instruction) -> DeviceReply:
        if not isinstance(given, SumPart):
            return given
        numbers = (given.numbers & 0xFFFFFFFF).astype(np.uint32)
        return part_reply(given, numbers, self.devices.code(question.plan.round))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for reply in super().send_and_receive(messages, timeout=timeout):
            self.sent.append(reply)
            yield reply


@dataclass(frozen=True)
class Federated:
    """A federation that has ended, as its server saw it."""

    cohort: InMemory
    shared: torch.Tensor  # (P,): after the last round
    server: ServerConfig
    facts: dict[int, RoundFacts]
    sent: list[Message]  # every reply of every device

    @property
    def context(self) -> CohortContext:
        return self.cohort.context

    @property
    def aggregated(self) -> list[torch.Tensor]:
        """By round, (P,): what the round changed in the shared adapter."""
        after = [*self.cohort.received[1:], self.shared]
        return [b - a for a, b in zip(self.cohort.received, after, strict=True)]


@contextmanager
def passing_ledger() -> Iterator[Ledger]:
    """An empty one, gone afterwards."""
    with TemporaryDirectory() as folder:
        yield Ledger(Path(folder) / "ledger.db")


def federate_in_memory(
    lm: LanguageModel,
    config: DeviceConfig,
    server: ServerConfig,
    streams: Mapping[str, Sequence[Dialogue]],
    seed: int,
    *,
    at_once: bool = False,
    listener: Callable[[str], None] | None = None,
    coins: Coins | None = None,
    masked: bool = False,
) -> Federated:
    """A federation of devices with these streams, by name. Its ledger is gone when it has ended.

    `masked`: parts of a sum are masked as devices do it, which changes what is sent and not the sum;
    `coins`: those that its devices toss; None: as every device does.
    """
    replies = {name: {d.id: d.response for d in stream} for name, stream in streams.items()}
    with passing_ledger() as ledger:
        context = CohortContext.of(
            lm, config, seed, lambda device, dialogue: replies[device][dialogue], listener, ledger
        )
        cohort = InMemory(replace(context, coins=coins or context.coins), streams, at_once)
        return federate_cohort(cohort, server, masked=masked)


def federate_cohort(
    cohort: InMemory, server: ServerConfig, limits: Limits | None = None, *, masked: bool = False
) -> Federated:
    """All rounds, by the strategy that every engine runs, within the devices' own limits or these.

    `masked` as in `federate_in_memory`.

    Raises `ConfigError` for a server that has no rounds.
    """
    if not server.by_rounds:
        raise ConfigError("studies and audits ask by rounds; server.buffer and server.rule = 'none' do not")
    strategy, start = new_strategy(cohort.context, server, limits)
    if strategy.sums:
        strategy.sums = replace(strategy.sums, masked=masked)
    grid = RecordingGrid(cohort, list(cohort.streams), masked=masked)
    shared = federate(grid, strategy, Recorder(), start, cohort.context.config.rounds)
    return Federated(cohort, shared, server, strategy.facts, grid.sent)
