"""A device's sessions of secure aggregation: where they are kept between two questions of a server, and what answers.

A session is of one round. It begins anew when a server asks for keys, until masked numbers have left: from then on the
round has had its one chance, or a server could learn two sums of the same numbers. A simulation that was killed plays
its round again with the same devices, who give the same numbers: its server is its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_bytes
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from florilegium.client.context import CohortContext
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.secure_aggregation import wire
from florilegium.privacy.secure_aggregation.adverts import certified
from florilegium.privacy.secure_aggregation.keys import identity_key
from florilegium.privacy.secure_aggregation.neighbours import RoundRefusedError
from florilegium.privacy.secure_aggregation.rounded_noise import SumCode
from florilegium.privacy.secure_aggregation.session import Scene, Session, restored, stored
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
    """Of many simulated devices in this process, while it lasts.

    The registrar's and the devices' keys follow from the seed; a session's secrets do too, or come from the operating
    system, as [privacy] says.
    """

    context: CohortContext
    sessions: dict[tuple[str, int], Session] = field(default_factory=dict)

    def begin(self, device: str, number: int) -> Session:
        if (there := self.sessions.get((device, number))) and there.sent:
            raise RoundRefusedError("out-of-order")
        session = self.new(device, number, self.seed(device, number))
        self.sessions = {at: s for at, s in self.sessions.items() if at[1] == number}  # without rounds that are over
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
        return self.context.sum_code(number)

    def seed(self, device: str, number: int) -> bytes:
        """Of a new session."""
        often = self.context.config.privacy.secret == "seed"
        return self._secret("session", device, number) if often else token_bytes(32)

    def new(self, device: str, number: int, seed: bytes) -> Session:
        """One with this seed."""
        context, identity = self.context, identity_key(self._secret("identity", device))
        scene = Scene(context.experiment, number, device, self.registrar, context.config.summed.limits)
        public = identity.public_key().public_bytes_raw()
        return Session(scene, seed, identity, certified(self._registrar, scene.federation, device, public))

    @property
    def registrar(self) -> bytes:
        """Who says which devices there are, by the public half of the key."""
        return self._registrar.public_key().public_bytes_raw()

    @property
    def _registrar(self) -> Ed25519PrivateKey:
        return identity_key(self._secret("registrar"))

    def _secret(self, *purpose: str | int) -> bytes:
        return b"".join(derive_key(self.context.seed, *purpose, half).to_bytes(16, "big") for half in range(2))


@dataclass
class FolderSessions(SimulatedSessions):
    """As `SimulatedSessions`, where every question may come to another process: in a folder of the run.

    Of a session that is over there is only left that it was. A run that goes on begins with an empty folder.
    """

    folder: Path = Path()

    def begin(self, device: str, number: int) -> Session:
        if self._path(device, number).exists() and self.at(device, number).sent:
            raise RoundRefusedError("out-of-order")
        session = self.new(device, number, self.seed(device, number))
        self.keep(session)
        return session

    def at(self, device: str, number: int) -> Session:
        try:
            told = json.loads(self._path(device, number).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RoundRefusedError("out-of-order") from None
        if not told:
            raise RoundRefusedError("out-of-order")
        return restored(self.new(device, number, bytes.fromhex(told["seed"])), told)

    def keep(self, session: Session) -> None:
        self.folder.mkdir(exist_ok=True, mode=0o700)
        path = self._path(session.scene.device, session.scene.round)
        fresh = path.with_suffix(".new")
        told = {} if session.unmasked else {"seed": session.seed.hex(), **stored(session)}
        fresh.write_text(json.dumps(told), encoding="utf-8")
        fresh.replace(path)

    def _path(self, device: str, number: int) -> Path:
        return self.folder / f"{device}-{number:05d}.json"


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
