"""What a device writes down of its days: dialogues, what their owner thought of them, consents, what has left.

All in the vault, the encrypted file that the states and the ledger are in too.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from secrets import token_hex
from threading import Lock
from typing import TypeVar, cast

from florilegium.client.agent.errors import VaultError
from florilegium.client.agent.folder import sync_folder, with_journal
from florilegium.client.dialogue import Echo
from florilegium.privacy.common.database import connected

_TABLES = """
CREATE TABLE IF NOT EXISTS dialogue (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, time REAL, conversation TEXT, prompt TEXT, said TEXT,
    liked INTEGER, wanted TEXT NOT NULL DEFAULT '', cycle INTEGER
);
CREATE TABLE IF NOT EXISTS origin (
    number INTEGER PRIMARY KEY AUTOINCREMENT, dialogue TEXT UNIQUE, after INTEGER, causes TEXT
);
CREATE TABLE IF NOT EXISTS learned (dialogue TEXT PRIMARY KEY, cycle INTEGER);
CREATE TABLE IF NOT EXISTS held (dialogue TEXT PRIMARY KEY, until INTEGER);
CREATE TABLE IF NOT EXISTS trial (
    number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, cycle INTEGER, replies INTEGER, before REAL, after REAL,
    error REAL, decision TEXT
);
CREATE TABLE IF NOT EXISTS shown (
    trial INTEGER, dialogue TEXT, said_before TEXT, said_after TEXT, nll_before REAL, nll_after REAL
);
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT, bytes BLOB);
CREATE TABLE IF NOT EXISTS sent (
    number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, federation TEXT, round INTEGER, kind TEXT, bytes INTEGER,
    epsilon REAL
);
"""
HELD_BACK = (  # until so many learnings are over
    "SELECT dialogue FROM held WHERE until > (SELECT CAST(value AS INTEGER) FROM fact WHERE name = 'learnings')"
)
Fact = TypeVar("Fact")
Written = TypeVar("Written")
Write = Callable[[sqlite3.Connection], object]
_CONVERSATIONS = """
SELECT name, last, time, turns, (SELECT prompt FROM dialogue WHERE number = first) FROM (
    SELECT CASE conversation WHEN '' THEN id ELSE conversation END AS name, max(number) AS last, max(time) AS time,
    count(*) AS turns, min(number) AS first,
    max(prompt LIKE :sought ESCAPE '\\' OR said LIKE :sought ESCAPE '\\' OR wanted LIKE :sought ESCAPE '\\') AS found
    FROM dialogue GROUP BY name
) WHERE found AND (:before = 0 OR last < :before) ORDER BY last DESC LIMIT :most
"""
_COLUMNS = "number, id, time, conversation, prompt, said, liked, wanted, cycle"


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and the model's reply, and what the owner made of it."""

    number: int
    id: str
    time: float  # seconds since the epoch
    conversation: str
    prompt: str
    said: str
    liked: int | None  # 1, 0, or None where nothing was said of it
    wanted: str  # what the owner would have said
    cycle: int | None  # in which the device took it up

    @property
    def reply(self) -> str:
        """What to learn; empty where there is none, an `Echo` where it is the model's words."""
        if self.wanted.strip() not in ("", self.said.strip()):
            return self.wanted
        return Echo(self.wanted or (self.said if self.liked else ""))

    @property
    def feedback(self) -> float:
        """1: the reply was liked, 0: it was not, 0.5: nothing is known."""
        if self.liked is not None:
            return float(self.liked)
        return 0.0 if self.wanted else 0.5


@dataclass(frozen=True, slots=True)
class Conversation:
    """One of those that were had: its name, or the ID of a dialogue that is alone; its first prompt."""

    name: str
    last: int  # number of its last dialogue
    time: float  # of its last dialogue
    turns: int
    prompt: str


@dataclass(frozen=True, slots=True)
class Sent:
    """Something that has left the device."""

    time: float
    federation: str
    round: int
    kind: str  # release, or the code of a refusal
    bytes: int
    epsilon: float | None


class GroupCommit:
    """Small writes of many threads: those that come while one is on its way to the disk are one transaction after it.

    What a disk takes to have written is what such a write costs; so many of them wait for it once.
    """

    def __init__(self, opened: Callable[[], AbstractContextManager[sqlite3.Connection]]) -> None:
        self._opened, self._turn = opened, Lock()
        self._waiting = SimpleQueue[tuple[Write, Future[object]]]()

    def write(self, write: Callable[[sqlite3.Connection], Written]) -> Written:
        """What it returns, once it is on the disk. Raises what hinders any of those that are written with it."""
        mine = Future[object]()
        self._waiting.put((write, mine))
        with self._turn:
            if not mine.done():
                self._write_all()
        return cast(Written, mine.result())

    def _write_all(self) -> None:
        all_of_them = [self._waiting.get() for _ in range(self._waiting.qsize())]
        try:
            with self._opened() as connection:
                connection.execute("BEGIN IMMEDIATE")
                found = [write(connection) for write, _ in all_of_them]
                connection.execute("COMMIT")
        except BaseException as error:  # noqa: BLE001  # is raised by each of them
            for _, future in all_of_them:
                future.set_exception(error)
            return
        for (_, future), result in zip(all_of_them, found, strict=True):
            future.set_result(result)


class Vault:
    """The tables of the vault that are not states or accounts. What a method has written is on the disk."""

    def __init__(self, path: Path, key: str) -> None:
        """Raises `VaultError` for a file that is not one, or a key that does not fit."""
        self.path, self._key = path, key
        self._commits = GroupCommit(self.open)
        with self.open() as connection:
            connection.executescript(_TABLES)

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        try:
            with connected(self.path, self._key) as connection:
                yield connection
        except sqlite3.DatabaseError as error:
            raise VaultError(f"{self.path}: {error}; {_way_out(str(error))}") from error

    # -- dialogues ----------------------------------------------------------------------------------------------------

    def add(self, prompt: str, said: str, conversation: str, after: int = 0, causes: Sequence[str] = ()) -> Turn:
        """A dialogue that has just been had; said by what was learned in cycle `after`, with `causes` in sight."""
        identity = token_hex(8)
        with self.open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "INSERT INTO origin (dialogue, after, causes) VALUES (?, ?, ?)", (identity, after, json.dumps(causes))
            )
            connection.execute(
                "INSERT INTO dialogue (id, time, conversation, prompt, said) VALUES (?, ?, ?, ?, ?)",
                (identity, time.time(), conversation, prompt, said),
            )
            connection.execute("COMMIT")
        return self.turn(identity)

    def rate(self, identity: str, liked: bool | None, wanted: str) -> Turn:
        """What the owner thinks of a reply. Raises KeyError for a dialogue that is not there."""

        def write(connection: sqlite3.Connection) -> Turn | None:
            connection.execute("UPDATE dialogue SET liked = ?, wanted = ? WHERE id = ?", (liked, wanted, identity))
            row = connection.execute(f"SELECT {_COLUMNS} FROM dialogue WHERE id = ?", (identity,)).fetchone()
            return Turn(*row) if row else None

        found = self._commits.write(write)
        if found is None:
            raise KeyError(identity)
        return found

    def turn(self, identity: str) -> Turn:
        """Raises KeyError for a dialogue that is not there."""
        found = self.turns("WHERE id = ?", (identity,))
        if not found:
            raise KeyError(identity)
        return found[0]

    def turns(self, where: str = "", values: Sequence[object] = ()) -> list[Turn]:
        """Dialogues in the order in which they were had."""
        with self.open() as connection:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM dialogue {where} ORDER BY number", values).fetchall()
        return [Turn(*row) for row in rows]

    def held(self) -> frozenset[str]:
        """The dialogues whose replies are held back now."""
        with self.open() as connection:
            return frozenset(i for (i,) in connection.execute(HELD_BACK).fetchall())

    def is_held(self, identity: str) -> bool:
        """Whether a dialogue's reply is held back now."""
        with self.open() as connection:
            return connection.execute(f"{HELD_BACK} AND dialogue = ?", (identity,)).fetchone() is not None

    def saying(self, line: str) -> list[Turn]:
        """The dialogues in which somebody said just this, whatever is around it."""
        return self.turns("WHERE ?1 IN (trim(prompt), trim(said), trim(wanted))", (line.strip(),))

    def conversations(self, search: str = "", before: int = 0, most: int = 20) -> list[Conversation]:
        """The newest conversations in which these words were said, those before a dialogue's number; newest first."""
        sought = "%" + re.sub(r"([%_\\])", r"\\\1", search) + "%"
        with self.open() as connection:
            rows = connection.execute(_CONVERSATIONS, {"sought": sought, "before": before, "most": most}).fetchall()
        return [Conversation(*row) for row in rows]

    def conversation(self, name: str) -> list[Turn]:
        """The dialogues of a conversation, or the one of this ID that is in none."""
        return self.turns("WHERE conversation = ?1 OR (conversation = '' AND id = ?1)", (name,)) if name else []

    def ends(self, turn: Turn) -> bool:
        """Whether a dialogue is the last one of a conversation."""
        return bool(turn.conversation) and not self.turns(
            "WHERE conversation = ? AND number > ?", (turn.conversation, turn.number)
        )

    def count(self) -> int:
        with self.open() as connection:
            return int(connection.execute("SELECT count(*) FROM dialogue").fetchone()[0])

    def take_up(self, cycle: int) -> list[Turn]:
        """The dialogues that are new, now of this cycle; asked again, the same ones."""
        with self.open() as connection:
            connection.execute("UPDATE dialogue SET cycle = ? WHERE cycle IS NULL", (cycle,))
        return self.turns("WHERE cycle = ?", (cycle,))

    def forget(self, identities: Sequence[str], also: Callable[[sqlite3.Connection], None] | None = None) -> None:
        """Erases dialogues, all at once, overwritten, not only unlinked; `also` writes in the same transaction."""
        with self.open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            for table, name in (("dialogue", "id"), ("held", "dialogue"), ("shown", "dialogue")):
                connection.executemany(f"DELETE FROM {table} WHERE {name} = ?", [(i,) for i in identities])
            if also:
                also(connection)
            connection.execute("COMMIT")

    def said_under(self, identities: Collection[str]) -> list[Turn]:
        """What the model said after it had learned from these, or with them in sight, or through other such replies."""
        with self.open() as connection:
            origins = connection.execute("SELECT dialogue, after, causes FROM origin ORDER BY number").fetchall()
            learned = dict(connection.execute("SELECT dialogue, cycle FROM learned").fetchall())
        reached = set(identities)
        since = min((learned[i] for i in reached if i in learned), default=math.inf)
        for dialogue, after, causes in origins:  # in the order of time: what a reply came from was there before it
            if after >= since or not reached.isdisjoint(json.loads(causes)):
                reached.add(dialogue)
                since = min(since, learned.get(dialogue, math.inf))
        return [t for t in self.turns() if t.id in reached and t.id not in identities and t.said]

    def compact(self) -> None:
        """Gives back the room of what was deleted."""
        with self.open() as connection:
            connection.execute("VACUUM")

    # -- facts --------------------------------------------------------------------------------------------------------

    def fact(self, name: str, default: Fact) -> Fact:
        """What was set under a name, of the kind of the default."""
        with self.open() as connection:
            row = connection.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        found: Fact = json.loads(row[0]) if row else default
        return found

    def facts(self, names: Sequence[str]) -> dict[str, object]:
        """The facts of these names that are there."""
        places = ", ".join("?" * len(names))
        with self.open() as connection:
            rows = connection.execute(f"SELECT name, value FROM fact WHERE name IN ({places})", names).fetchall()
        return {name: json.loads(value) for name, value in rows}

    def set_fact(self, name: str, value: object, data: bytes = b"") -> None:
        with self.open() as connection:
            write_fact(connection, name, value, data)

    def fact_bytes(self, name: str) -> bytes:
        with self.open() as connection:
            row = connection.execute("SELECT bytes FROM fact WHERE name = ?", (name,)).fetchone()
        return bytes(row[0]) if row else b""

    # -- what has left ------------------------------------------------------------------------------------------------

    def sent(self) -> list[Sent]:
        with self.open() as connection:
            found = connection.execute(
                "SELECT time, federation, round, kind, bytes, epsilon FROM sent ORDER BY number"
            ).fetchall()
        return [Sent(*row) for row in found]

    def releases(self) -> list[Sent]:
        """What was sent of a shared adapter."""
        return [s for s in self.sent() if s.kind == "release"]

    # -- wholeness ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises `VaultError` where a page of the file was changed or is missing."""
        with self.open() as connection:
            broken = connection.execute("PRAGMA cipher_integrity_check").fetchall()
            if broken or connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("the file is damaged")
            if not connection.execute("SELECT count(*) FROM fact WHERE name = 'base'").fetchone()[0]:
                raise sqlite3.DatabaseError("the file is empty")

    def copy_to(self, path: Path) -> None:
        """Makes a whole copy under the same key in place of an older one; or no other, whenever the power fails."""
        beside = path.with_name(f"{path.name}.new")
        try:
            beside.unlink(missing_ok=True)
            with self.open() as connection, connected(beside, self._key) as copy:
                connection.backup(copy)
            beside.replace(path)
            sync_folder(path.parent)
        finally:
            for left in (beside, with_journal(beside)):
                left.unlink(missing_ok=True)


def write_sent(connection: sqlite3.Connection, sent: Sent) -> None:
    """Notes what has left, within a transaction of its caller's."""
    connection.execute(
        "INSERT INTO sent (time, federation, round, kind, bytes, epsilon) VALUES (?, ?, ?, ?, ?, ?)",
        (sent.time, sent.federation, sent.round, sent.kind, sent.bytes, sent.epsilon),
    )


def write_learned(connection: sqlite3.Connection, dialogues: Iterable[str], cycle: int) -> None:
    """Notes that the adapter has learned from these since this cycle, within a transaction of its caller's."""
    connection.executemany("INSERT OR IGNORE INTO learned VALUES (?, ?)", [(d, cycle) for d in dialogues])


def unsay(connection: sqlite3.Connection, replies: Iterable[str]) -> None:
    """Erases the model's words in these dialogues, not its owner's, within a transaction of its caller's."""
    connection.executemany(
        "UPDATE dialogue SET said = '', wanted = CASE trim(wanted) WHEN trim(said) THEN '' ELSE wanted END "
        "WHERE id = ?",
        [(i,) for i in replies],
    )


def forget_origins(connection: sqlite3.Connection, dialogues: Iterable[str]) -> None:
    """Forgets how dialogues came about that are erased, within a transaction of its caller's.

    What only grew old keeps that: others came from it.
    """
    for table in ("origin", "learned"):
        connection.executemany(f"DELETE FROM {table} WHERE dialogue = ?", [(i,) for i in dialogues])


def write_fact(connection: sqlite3.Connection, name: str, value: object, data: bytes = b"") -> None:
    """Sets a fact, within a transaction of its caller's."""
    connection.execute("INSERT OR REPLACE INTO fact VALUES (?, ?, ?)", (name, json.dumps(value), data))


def _way_out(error: str) -> str:
    if "full" in error or "disk I/O" in error:
        return "make room on the disk; what was written before is kept"
    return "if the key is right, the file is damaged: florilegium device restore goes back to the last good copy"
