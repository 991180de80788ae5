"""What devices have spent: written down, and on the disk, before it is spent.

One SQLite file holds the accounts of the devices of one host: a real device has one account, a simulation thousands.
An entry says what is about to happen (σ, q, T, and to which dialogues), never what it costs. Each is chained to the
one before by a hash whose beginning is the device's secret: an entry that was changed, or left out, breaks the chain.
What a chain cannot show is that its end was cut off; so the newest head is also kept by the device's other state and
by the server, and an account that does not hold a head that they have seen pays for nothing any more. Where noise is
drawn anew each time, an entry holds a random number as well: a device that is set back to an old state and pays for a
round again comes to another head, and the one that the server has seen is then missing.

A crash after a reservation counts as spent. Refused is one device, never its company.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from threading import Lock
from typing import Protocol

from florilegium.privacy.accounting import Adjacency, Event, covered, epsilon
from florilegium.privacy.common.database import connected
from florilegium.privacy.common.errors import DeviceFaultError

# Why nothing is released. GRANTED is the only answer that allows it.
GRANTED, SPENT, ANSWERED, MISSING, BEHIND, BROKEN, OTHER_UNIT, OTHER_TERMS, TWICE = (
    "", "budget-spent", "already-answered", "ledger-missing", "ledger-behind", "ledger-broken", "other-unit",
    "other-terms", "asked-twice",
)  # fmt: skip
NAME_BYTES = 8  # of a dialogue in an entry
KNOWN = 2048  # accounts that a ledger keeps in memory
_TABLE = """
CREATE TABLE IF NOT EXISTS entry (
    device TEXT, number INTEGER, experiment TEXT, round INTEGER, received TEXT,
    noise_multiplier REAL, sampling_rate REAL, steps INTEGER, unit TEXT, nonce TEXT, dialogues BLOB, head TEXT,
    PRIMARY KEY (device, number)
) WITHOUT ROWID
"""


class LedgerError(DeviceFaultError):
    """The ledger's file cannot be read: nothing can be paid for."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent for each dialogue, or for a device for its life, in the sense of `adjacency`."""

    epsilon: float
    delta: float
    adjacency: Adjacency
    of: str  # "dialogue" or "device"
    in_sum: bool = False  # whether what is protected is a device's part of a sum, which is added or left out

    @property
    def unit(self) -> str:
        """What entries were spent for. What one sense costs says nothing of another: neither is reckoned in it."""
        return f"{self.of} in a sum" if self.in_sum else self.of

    def objection(self, events: Sequence[Event]) -> str:
        """Why these are not all paid for: together they cost too much, or nobody has proved what they cost together."""
        if not covered(events):
            return OTHER_TERMS
        return GRANTED if epsilon(events, self.delta, self.adjacency) <= self.epsilon else SPENT


@dataclass(frozen=True, slots=True)
class Request:
    """A device's wish to train for a release. `(experiment, round)` is paid for once.

    `received` names what the server sent; `heads` are those that the account must hold; `genesis` is secret. Only what
    would be drawn as before is granted again: `repeatable`.
    """

    device: str
    genesis: str
    experiment: str
    round: int
    received: str
    event: Event
    dialogues: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    repeatable: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether a device may train, on which of its dialogues, and the account's head from then on."""

    refusal: str
    head: str = ""
    dialogues: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of an account."""

    experiment: str
    round: int
    received: str
    event: Event
    unit: str  # what the event was spent for: "dialogue", "device" or "device in a sum"
    dialogues: tuple[bytes, ...]
    nonce: str = ""  # of what is drawn anew each time

    @property
    def facts(self) -> tuple[object, ...]:
        event = self.event
        spent = (event.noise_multiplier, event.sampling_rate, event.steps)
        return (self.experiment, self.round, self.received, *spent, self.unit, self.nonce)

    def chained(self, before: str, genesis: str) -> str:
        """The head after this entry: without the device's secret nobody can tell what it is made of."""
        said = json.dumps([*self.facts, b"".join(self.dialogues).hex()])
        return blake2b(f"{before} {said}".encode(), key=bytes.fromhex(genesis)[:64], digest_size=32).hexdigest()


@dataclass
class Account:
    """All entries of one device; `heads[n]` is the head after n of them."""

    heads: list[str]
    entries: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry, head: str) -> None:
        self.heads.append(head)
        self.entries.append(entry)

    def next_head(self, entry: Entry) -> str:
        """What the head would be with one more entry."""
        return entry.chained(self.heads[-1], self.heads[0])

    @property
    def events(self) -> list[Event]:
        return [e.event for e in self.entries]

    def events_of(self, dialogue: bytes) -> list[Event]:
        """The steps that this dialogue could have been drawn for."""
        return [e.event for e in self.entries if dialogue in e.dialogues]

    def spent(self, budget: Budget) -> float:
        """ε of the device, or of that of its dialogues which has spent most."""
        if budget.of == "device":
            return epsilon(self.events, budget.delta, budget.adjacency)
        dialogues = {d for e in self.entries for d in e.dialogues}
        return max((epsilon(self.events_of(d), budget.delta, budget.adjacency) for d in dialogues), default=0.0)


class Accounts(Protocol):
    """Where devices pay: a `Ledger`, or several of them."""

    def reserve(self, requests: Sequence[Request], budget: Budget) -> list[Answer]: ...

    def account(self, device: str, genesis: str) -> Account | None: ...

    def accounts(self, devices: Sequence[tuple[str, str]]) -> list[Account | None]: ...


class Ledger:
    """The accounts of one host. A change is on the disk when the method returns."""

    def __init__(self, path: Path, key: str = "") -> None:
        """Raises `LedgerError` for a file that is not a ledger; `key` encrypts it."""
        self.path, self._key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Account] = {}  # read and found whole
        self._lock = Lock()  # of `_known`, which is to follow what is in the file
        with self._connected() as connection:
            connection.execute(_TABLE)

    def reserve(self, requests: Sequence[Request], budget: Budget) -> list[Answer]:
        """Pays for what is affordable, all in one write; one answer a request, none granted to who asks twice.

        Asked again for the same, the last round is granted and not paid for twice; asked for one that was paid for with
        something else received, or before another, it is refused: the same noise on two adapters would cancel. Where
        noise is drawn anew each time a round is never granted again: what was paid for and not sent is lost. Rounds may
        come in any order, or a question for the last one would use all others up.
        """
        with self._connected() as connection, self._lock:  # in this order: a thread may have the file's turn already
            connection.execute("BEGIN IMMEDIATE")
            asked = Counter(r.device for r in requests)
            judged = [
                _judged(r, budget, self._read(r.device, r.genesis, connection))
                if asked[r.device] == 1
                else (Answer(TWICE), None)
                for r in requests
            ]
            new = [(r.device, entry, answer.head) for r, (answer, entry) in zip(requests, judged, strict=True) if entry]
            rows = [self._row(device, entry, head) for device, entry, head in new]
            connection.executemany(f"INSERT INTO entry VALUES ({', '.join('?' * 12)})", rows)
            connection.execute("COMMIT")
            for device, entry, head in new:
                self._known[device].add(entry, head)
            self._forget()
        return [answer for answer, _ in judged]

    def account(self, device: str, genesis: str) -> Account | None:
        """A device's entries, None where the chain is broken."""
        return self.accounts([(device, genesis)])[0]

    def accounts(self, devices: Sequence[tuple[str, str]]) -> list[Account | None]:
        """Those of many devices with their secrets, read at once."""
        with self._connected() as connection, self._lock:  # in this order: a thread may have the file's turn already
            found = [self._read(device, genesis, connection) for device, genesis in devices]
            self._forget()
        return found

    def _forget(self) -> None:
        """Keeps the accounts that were used last: memory does not grow with the devices that ever paid."""
        for device in list(self._known)[: max(0, len(self._known) - KNOWN)]:
            del self._known[device]

    def _row(self, device: str, entry: Entry, head: str) -> tuple[object, ...]:
        return device, len(self._known[device].entries), *entry.facts, b"".join(entry.dialogues), head

    def _read(self, device: str, genesis: str, connection: sqlite3.Connection) -> Account | None:
        """The account, its chain checked from where it was checked before."""
        account = self._known.pop(device, None) or Account([genesis])  # to be put behind all others
        if account.heads[0] != genesis:
            return None
        found = connection.execute(
            "SELECT number, experiment, round, received, noise_multiplier, sampling_rate, steps, unit, nonce, "
            "dialogues, head "
            "FROM entry WHERE device = ? AND number >= ? ORDER BY number",
            (device, len(account.entries)),
        )
        for number, experiment, round_number, received, sigma, rate, steps, unit, nonce, dialogues, head in found:
            names = tuple(dialogues[i : i + NAME_BYTES] for i in range(0, len(dialogues), NAME_BYTES))
            entry = Entry(experiment, round_number, received, Event(sigma, rate, steps), unit, names, nonce)
            if (number, head) != (len(account.entries), account.next_head(entry)):
                return None
            account.add(entry, head)
        self._known[device] = account
        return account

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            with connected(self.path, self._key) as connection:
                yield connection
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{self.path} cannot be used as a ledger: {error}; nothing is released") from error


def dialogue_name(genesis: str, dialogue: str) -> bytes:
    """What a dialogue is called in the ledger: nobody without the device's secret can tell which it is."""
    return blake2b(dialogue.encode(), key=bytes.fromhex(genesis)[:64], digest_size=NAME_BYTES).digest()


def _judged(request: Request, budget: Budget, account: Account | None) -> tuple[Answer, Entry | None]:
    """The answer, and what is to be written."""
    if account is None:
        return Answer(BROKEN), None
    refusal = _objection(request, budget, account)
    if refusal:
        return Answer(refusal), None
    names = {d: dialogue_name(request.genesis, d) for d in request.dialogues}
    repeated = next(
        (e for e in account.entries if (e.experiment, e.round) == (request.experiment, request.round)), None
    )
    if repeated:
        granted = frozenset(d for d in names if budget.of == "device" or names[d] in repeated.dialogues)
        return Answer(GRANTED, account.heads[-1], granted), None
    if budget.of == "device" and (refusal := budget.objection([*account.events, request.event])):
        return Answer(refusal), None
    if budget.of == "dialogue":
        names, refusals = _affordable(names, request.event, budget, account)
        if request.dialogues and not names:
            return Answer(SPENT if SPENT in refusals else OTHER_TERMS), None
    paid_for = tuple(names.values()) if budget.of == "dialogue" else ()
    nonce = "" if request.repeatable else token_hex(16)
    entry = Entry(request.experiment, request.round, request.received, request.event, budget.unit, paid_for, nonce)
    return Answer(GRANTED, account.next_head(entry), frozenset(names)), entry


def _affordable(
    names: dict[str, bytes], event: Event, budget: Budget, account: Account
) -> tuple[dict[str, bytes], set[str]]:
    """The dialogues that can pay for one more event, and why others cannot; who paid for the same is judged at once."""
    paid: dict[str, tuple[int, ...]] = {
        d: tuple(i for i, entry in enumerate(account.entries) if n in entry.dialogues) for d, n in names.items()
    }
    refusals = {
        entries: budget.objection([*(account.entries[i].event for i in entries), event])
        for entries in set(paid.values())
    }
    return {d: n for d, n in names.items() if not refusals[paid[d]]}, set(refusals.values())


def _objection(request: Request, budget: Budget, account: Account) -> str:
    """Why an account must not pay, whatever is left in it."""
    if any(e.unit != budget.unit for e in account.entries):
        return OTHER_UNIT
    if not set(request.heads) <= set(account.heads):
        return BEHIND if account.entries else MISSING
    own = [e for e in account.entries if e.experiment == request.experiment]
    again = [e for e in own if e.round == request.round]
    if (
        again
        and request.repeatable
        and (again[0].received, again[0].event) == (request.received, request.event)
        and again[0] is own[-1]
    ):
        return ""
    return ANSWERED if again else ""
