"""A real device's sessions of secure aggregation, in its vault: one at a time, and of a round whose numbers exist none.

What a session is told, and what it answers, is on the disk before the answer leaves: a process that is killed and
opened again goes on where it was, with the same secrets, so that it says the same or nothing. Keys are made anew for a
round only while no numbers have been computed for it: these are computed once, and leave behind one session's masks.
When the last step is answered, or another round begins, a session's secrets are gone. Not covered: a home that is put
back as a whole to what it was.
"""

from __future__ import annotations

from secrets import token_bytes
from typing import TYPE_CHECKING, TypedDict

from florilegium.client.agent.device import SESSION, Device
from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.registration import identity_of
from florilegium.privacy.secure_aggregation.neighbours import RoundRefusedError
from florilegium.privacy.secure_aggregation.rounded_noise import SumCode
from florilegium.privacy.secure_aggregation.session import Scene, Session, StoredSession, restored, stored

if TYPE_CHECKING:
    from florilegium.client.agent.terms import Membership

ANSWERED = "answered rounds"  # the fact with the rounds whose numbers have been computed, by federation


class _Kept(TypedDict):
    federation: str
    round: int
    seed: str
    told: StoredSession


class VaultSessions:
    """Of the one device there is; under the name of its registration, whatever it calls itself."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def begin(self, device: str, number: int) -> Session:
        """The same keys again while nothing else was said, others after it.

        Raises `RoundRefusedError` for a round that is not in the terms, or whose numbers there are already.
        """
        there = self._membership
        if not 1 <= number <= there.rounds:
            raise RoundRefusedError("not-its-round")
        answered: dict[str, list[int]] = self.device.vault.fact(ANSWERED, {})
        if number in answered.get(there.name, []):
            raise RoundRefusedError("out-of-order")
        kept = self._kept(there, number)
        if kept and not kept["told"]["names"]:
            return self._session(there, kept)
        session = self._new(there, number, token_bytes(32))
        self.keep(session)
        return session

    def at(self, device: str, number: int) -> Session:
        """The one that is going on; raises `RoundRefusedError` for any other."""
        there = self._membership
        kept = self._kept(there, number)
        if kept is None:
            raise RoundRefusedError("out-of-order")
        return self._session(there, kept)

    def keep(self, session: Session) -> None:
        """On the disk; of one that has said all nothing, nor of a federation that its owner has left meanwhile."""
        scene, there = session.scene, self.device.membership
        kept: _Kept | None = None
        if not session.unmasked and there and there.federation == scene.federation:
            kept = {
                "federation": scene.federation, "round": scene.round, "seed": session.seed.hex(),
                "told": stored(session),
            }  # fmt: skip
        self.device.vault.set_fact(SESSION, kept)

    def code(self, number: int) -> SumCode:
        """How numbers of a round become integers: as the terms say."""
        return self.device.context_in(self._membership).sum_code(number)

    @property
    def _membership(self) -> Membership:
        there = self.device.membership
        if there is None or there.distributed is None or there.registration is None:
            raise AgentError("this device is in no federation that has sums")
        return there

    def _kept(self, there: Membership, number: int) -> _Kept | None:
        found: _Kept | None = self.device.vault.fact(SESSION, None)
        return found if found and (found["federation"], found["round"]) == (there.federation, number) else None

    def _session(self, there: Membership, kept: _Kept) -> Session:
        return restored(self._new(there, kept["round"], bytes.fromhex(kept["seed"])), kept["told"])

    def _new(self, there: Membership, number: int, seed: bytes) -> Session:
        assert there.distributed and there.registration
        registrar, limits = bytes.fromhex(there.distributed.registrar), there.distributed.limits
        scene = Scene(there.federation, number, there.registration.device, registrar, limits)
        identity = identity_of(self.device.vault, there.federation)
        return Session(scene, seed, identity, bytes.fromhex(there.registration.certificate))
