"""A grid whose devices are unequal: who is asked, who answers in time and how long that takes, by a simulated clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flwr.app import Message, MessageType

from florilegium.client.secure_sessions import Sessions
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Schema
from florilegium.privacy.secure_aggregation.wire import KEYS, SHARES
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.engines.cohort_grid import CohortGrid, Spread
from florilegium.simulation.heterogeneity.availability import Work
from florilegium.simulation.heterogeneity.clock import WAITED_FOR, BufferedClock, Clock


class WorldGrid(CohortGrid):
    """Devices that are there or not, fast or slow: of those that compute, only some answer in time."""

    def __init__(
        self, spread: Spread, schema: Schema, names: Sequence[str], clock: Clock, sessions: Sessions | None = None
    ) -> None:
        super().__init__(spread, schema, names, sessions)
        self.clock = clock

    def _asked(self, messages: Sequence[Message]) -> Iterator[Message]:
        by_name = {self._name(m): m for m in messages}
        number = int(str(messages[0].content.config_records["plan"]["round"]))
        fates = self.clock.round(number, list(by_name)).outcomes
        asking = messages[0].metadata.message_type == MessageType.TRAIN
        present = WAITED_FOR if asking else ("answers", "late")  # who dropped out is not back yet
        for reply in super()._asked([m for name, m in by_name.items() if fates[name] in present]):
            if not asking or fates[self.names[reply.metadata.src_node_id - 1]] == "answers":
                yield reply

    def _step(self, messages: Sequence[Message], sessions: Sessions) -> Iterator[Message]:
        """Who is there says keys and shares; later only who is there in time with what it learned."""
        number = int(str(messages[0].content.config_records["plan"]["round"]))
        outcomes = self.clock.round(number, [self._name(m) for m in messages]).outcomes
        early = messages[0].metadata.message_type in (KEYS, SHARES)
        there = [m for m in messages if outcomes[self._name(m)] in (WAITED_FOR if early else ("answers",))]
        return super()._step(there, sessions)


def open_clock(devices: SimulatedDevices, names: Sequence[str]) -> Clock | None:
    """The clock of a run's world, if it has one."""
    config, context, world = devices.run.config, devices.context, devices.world
    if world is None:
        return None
    down_bytes = 2 * context.download_bytes(config.server.products != "average")  # before its training, and after

    def work(name: str) -> Work:
        tokens = devices.planned(name)
        return Work(tokens.before, tokens.after, down_bytes, context.upload_bytes(name, RoundPlan(1, 0)))

    adapter_bytes = 4 * 4 * context.personal_layout.width  # with its gradient and two moments
    needed_bytes = context.lm.parameter_bytes + adapter_bytes
    if config.server.buffer:
        server = config.server
        return BufferedClock(world, work, server.buffer, needed_bytes, devices=names, concurrency=server.concurrency)
    return Clock(world, work, config.server.wanted(len(names)), needed_bytes)
