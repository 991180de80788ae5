"""A round of secure aggregation over Flower's messages: five questions, and the sum of those who answered them all.

Whoever is silent at a step, or says what has not its form, is left out from then on. Not covered: what the sum becomes
(`server.strategy`), and what protects devices from a server that asks otherwise (`privacy.secure_aggregation`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from florilegium.privacy.release import PROTOCOL
from florilegium.privacy.reply_gate import CODES, FAILED, RELEASE
from florilegium.privacy.secure_aggregation import wire
from florilegium.privacy.secure_aggregation.neighbours import RoundRefusedError, SumLimits
from florilegium.privacy.secure_aggregation.rounded_noise import Row, SumCode
from florilegium.server.release_collector import MALFORMED, RoundFacts, to_numpy
from florilegium.server.secure_sum import SecureSum

NO_ARRAYS = ArrayRecord()
SILENT = "silent"
Header = Mapping[str, object]
Take = Callable[[str, Header, RecordDict], None]  # a device, its answer's header, and all of it


@dataclass(frozen=True)
class SumTerms:
    """What a server knows of its devices' sums: public, the same on all of them."""

    federation: str
    limits: SumLimits
    registrar: bytes  # who says which devices there are
    code: Callable[[int], SumCode]  # by round
    masked: bool = True  # False: a simulation's devices send their parts as they are, whose sum is the same


class Asker(Protocol):
    """Who makes a server's messages: a strategy."""

    def messages(
        self,
        names: Iterable[str],
        number: int,
        version: int,
        arrays: ArrayRecord,
        kind: str,
        secure: Mapping[str, wire.Told] | None = None,
    ) -> list[Message]: ...


@dataclass(frozen=True)
class Summed:
    """What a round came to."""

    row: Row  # (P,) of what travels: the sum of the devices' changes, with their noise
    heads: Mapping[str, str]  # of the ledgers of those in it


@dataclass
class SecureRound:
    """One round of these devices, by Flower's node ids."""

    terms: SumTerms
    number: int
    devices: Mapping[int, str]
    asker: Asker
    grid: Grid
    timeout: float
    facts: RoundFacts
    outcomes: dict[str, str] = field(default_factory=dict)  # of devices that are out: why

    def play(self, names: list[str], arrays: ArrayRecord) -> Summed | None:
        """The sum of those of these devices that came through; None, and why in the facts, where there is none."""
        terms, code = self.terms, self.terms.code(self.number)
        secure = SecureSum((terms.federation, self.number), code.width, code.bits, terms.limits, terms.registrar)
        try:
            heads = self._play(secure, code, names, arrays) if terms.masked else self._plain(secure, names, arrays)
            total = secure.total() if terms.masked else secure.plain_total()
        except RoundRefusedError as error:
            self._note(names, str(error), ())
            return None
        self._note(names, "", secure.came)
        self.facts.held_bytes = 4 * code.width
        return Summed(code.decoded(total.astype("int64")), heads)

    def _note(self, names: list[str], why: str, came: Collection[str]) -> None:
        """What became of each device: in the sum, silent, or refused for its own fault, or for what ended the round."""
        facts, outcomes = self.facts, Counter(self.outcomes.get(name, why) for name in names if name not in came)
        facts.releases, facts.silent = len(came), outcomes.pop(SILENT, 0)
        facts.refused = {code: count for code, count in sorted(outcomes.items()) if code}

    def _play(self, secure: SecureSum, code: SumCode, names: list[str], arrays: ArrayRecord) -> dict[str, str]:
        """The five questions; returns the heads of the ledgers of those whose numbers came."""
        heads = dict[str, str]()
        told: dict[str, wire.Told] = {n: {} for n in names}
        self._ask(wire.KEYS, told, lambda n, h, _: secure.take_advert(n, wire.read_advert(h["advert"])))
        secure.close_keys()
        told = {n: wire.tell_shares(secure.names, secure.adverts_for(n)) for n in secure.names}
        self._ask(wire.SHARES, told, lambda n, h, _: secure.take_shares(n, wire.read_shares_reply(h)))
        secure.check(len(secure.members))
        told = {n: wire.tell_masked(secure.members, secure.inbox(n)) for n in secure.members}
        self._ask(MessageType.TRAIN, told, self._part(secure, heads), arrays)
        came = sorted(secure.came)
        secure.check(len(came))
        told = {n: wire.tell_confirm(came) for n in came}
        self._ask(wire.CONFIRM, told, lambda n, h, _: secure.take_confirmation(n, wire.read_confirmation(h)))
        told = {n: wire.tell_unmask(secure.confirmations_for(n)) for n in sorted(secure.confirmations)}
        self._ask(wire.UNMASK, told, lambda n, h, _: secure.take_parts(n, wire.read_parts(h)))
        return heads

    def _plain(self, secure: SecureSum, names: list[str], arrays: ArrayRecord) -> dict[str, str]:
        """The parts as they are, of simulated devices."""
        heads = dict[str, str]()
        secure.shares = {name: {} for name in names}
        self._ask(MessageType.TRAIN, {name: {} for name in names}, self._part(secure, heads), arrays)
        return heads

    def _part(self, secure: SecureSum, heads: dict[str, str]) -> Take:
        """Takes a device's numbers, and the head of the ledger that paid for them."""

        def take(name: str, header: Header, content: RecordDict) -> None:
            if header["protocol"] != PROTOCOL or header["version"] != self.number - 1:
                raise ValueError("not a part of this round")
            if not RELEASE["head"](header["head"]):
                raise ValueError("not a ledger's head")
            sent = to_numpy(content.array_records["arrays"])
            secure.take_masked(name, wire.read_masked_array(sent, secure.width, secure.bits))
            heads[name] = str(header["head"])

        return take

    def _ask(self, kind: str, told: Mapping[str, wire.Told], take: Take, arrays: ArrayRecord = NO_ARRAYS) -> None:
        """Each of these devices once. What is no answer of the form is counted and left out."""
        waiting = set(told)
        asked = self.asker.messages(list(told), self.number, self.number - 1, arrays, kind, told)
        for reply in self.grid.send_and_receive(asked, timeout=self.timeout):
            name = self.devices.get(reply.metadata.src_node_id, "")
            if name not in waiting:
                continue
            waiting.remove(name)
            if why := _taken(name, reply, take):
                self.outcomes.setdefault(name, why)
        for name in waiting:
            self.outcomes.setdefault(name, SILENT)


def _taken(name: str, reply: Message, take: Take) -> str:
    """Hands an answer on; else the code of what was wrong with it."""
    if reply.has_error():
        return FAILED
    try:
        header = dict(reply.content.config_records["header"])
        if "error" in header:
            return str(header["error"]) if header["error"] in CODES else MALFORMED
        take(name, header, reply.content)
    except Exception:  # noqa: BLE001  # numpy, of bytes that are no array: EOFError, BadZipFile, MemoryError, …
        return MALFORMED
    return ""
