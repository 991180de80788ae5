"""A device's sessions of secure aggregation: where they are kept between two questions of a server, and what answers.

A session is of one round. It begins anew when a server asks for keys, until masked numbers have left: from then on the
round has had its one chance, or a server could learn two sums of the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from secrets import token_bytes
from typing import Protocol

from florilegium.client.calibration import sum_code
from florilegium.client.context import CohortContext
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.secure_aggregation import wire
from florilegium.privacy.secure_aggregation.keys import identity_key
from florilegium.privacy.secure_aggregation.neighbours import RoundRefusedError
from florilegium.privacy.secure_aggregation.rounded_noise import SumCode
from florilegium.privacy.secure_aggregation.session import Scene, Session, certified
from florilegium.privacy.seeds import derive_key


class Sessions(Protocol):
    """The sessions of one device, or of many."""

    def begin(self, device: str, number: int) -> Session:
        """A new one for a round; raises `RoundRefusedError` where masked numbers have left in it."""

    def at(self, device: str, number: int) -> Session:
        """The one that was begun; raises `RoundRefusedError` where none was."""

    def keep(self, session: Session) -> None:
        """Stores what it was told, before what it says leaves."""

    def code(self, number: int) -> SumCode:
        """How numbers of a round become integers."""


@dataclass
class SimulatedSessions:
    """Of many simulated devices in this process. Their secrets follow from the seed, or from the operating system."""

    context: CohortContext
    secret_of: Callable[[str, int], bytes] | None = None  # of a device in a round; None: as the settings say
    sessions: dict[tuple[str, int], Session] = field(default_factory=dict)

    def begin(self, device: str, number: int) -> Session:
        scene, registrar = self.scene(device, number), identity_key(self._secret("registrar"))
        identity = identity_key(self._secret("identity", device))
        public = identity.public_key().public_bytes_raw()
        seed = self._secret("session", device, number)
        if self.context.config.privacy.secret == "os":
            seed = token_bytes(32)
        session = Session(scene, seed, identity, certified(registrar, scene.federation, device, public))
        self.sessions = {at: s for at, s in self.sessions.items() if at[1] == number}  # rounds that are over are
        self.keep(session)
        return session

    def at(self, device: str, number: int) -> Session:
        try:
            return self.sessions[device, number]
        except KeyError:
            raise RoundRefusedError("out-of-order") from None

    def keep(self, session: Session) -> None:
        self.sessions[session.scene.device, session.scene.round] = session

    def code(self, number: int) -> SumCode:
        return sum_code(self.context.config, self.context.schema, number, self.context.seed)

    def scene(self, device: str, number: int) -> Scene:
        summed = self.context.config.summed
        registrar = identity_key(self._secret("registrar")).public_key().public_bytes_raw()
        return Scene(self.context.experiment, number, device, registrar, summed.survivors, summed.colluding)

    def _secret(self, *purpose: str | int) -> bytes:
        return b"".join(derive_key(self.context.seed, *purpose, half).to_bytes(16, "big") for half in range(2))


Answered = Mapping[str, wire.Value]


def answer_step(kind: str, told: wire.Record, device: str, number: int, sessions: Sessions) -> Answered:
    """What a device says to a question that is not about its numbers. Raises `RoundRefusedError` and ValueError."""
    if kind == wire.KEYS:
        if told:
            raise ValueError("a question for keys says nothing")
        return wire.reply_advert(sessions.begin(device, number).advert)
    session = sessions.at(device, number)
    said: Answered
    if kind == wire.SHARES:
        said = wire.reply_shares(session.shares(*wire.read_shares(told)))
    elif kind == wire.CONFIRM:
        said = wire.reply_confirmation(session.confirm(wire.read_confirm(told)))
    elif kind == wire.UNMASK:
        said = wire.reply_parts(session.unmask(wire.read_unmask(told)))
    else:
        raise ValueError(f"{kind!r} is no step")
    sessions.keep(session)
    return said


def open_part(told: wire.Record, device: str, plan: RoundPlan, sessions: Sessions) -> Session:
    """The session of a device that is asked for its numbers, with what its neighbours have sealed for it.

    Before anything is learned or paid for. Raises `RoundRefusedError` and ValueError.
    """
    session = sessions.at(device, plan.round)
    session.receive(*wire.read_masked(told))
    sessions.keep(session)
    return session
