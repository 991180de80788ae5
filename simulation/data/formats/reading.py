"""One reading of a file that others wrote: what its fields are called, and what is left out of it and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from florilegium.privacy.common.base_config import Config
from florilegium.simulation.data.conversations import Conversation, Turn, merge_turns
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import Row, shown
from florilegium.simulation.data.jsonl import moment
from florilegium.simulation.data.synonyms import CALLED

ROLES = {
    "assistant": {"assistant", "gpt", "bot", "chatgpt", "bard", "model", "chatbot"},
    "user": {"user", "human", "prompter"},
}
MAY_BE_ABSENT = ("domain", "id", "reply_to")  # from a row
FIRST = ", first "  # before the place where something was met first
Replies = Literal["assistant", "user"]
WHOSE: dict[Replies, str] = {
    "assistant": "replies are the assistant's; data.replies=user for the human's",
    "user": "replies are the human's; data.replies=assistant for the assistant's",
}
Dates = Literal["auto", "day-first", "month-first"]
Located = tuple[str, Row]  # where a row stands, for errors, and the row


class FieldNames(Config):
    """What a file calls what is called `user`, `time`, … here. Empty: one of the usual names."""

    user: str = Field(default="", description="whose reply a row holds, or who wrote a message")
    time: str = Field(default="", description="when it was written")
    prompt: str = Field(default="", description="what is replied to")
    response: str = Field(default="", description="the reply that is learned")
    domain: str = Field(default="", description="subject, label or channel")
    text: str = Field(default="", description="of a log of messages")
    conversation: str = Field(default="", description="conversation, thread or channel of a message")
    id: str = Field(default="", description="of a message that others answer")
    reply_to: str = Field(default="", description="id of the message that a message answers")


@dataclass
class Reading:
    """How one file is read, and what came of it so far."""

    fields: FieldNames = field(default_factory=FieldNames)
    replies: Replies = "assistant"
    reply_within_s: float = 3600.0
    dates: Dates = "auto"
    labelled: bool = False  # whether rows must have a domain: they are parted by it
    read_as: str = ""
    by_role: bool = False
    by_line: bool = False  # whether conversations are called after their lines
    conversations: int = 0
    notes: list[str] = field(default_factory=list)  # of what was taken for granted, for people
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # where each reason was met first
    _known: dict[tuple[str, tuple[str, ...]], str] = field(default_factory=dict)
    _named: bool | None = None
    _timed: bool | None = None

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out[reason] += 1
        self.first.setdefault(reason, where)

    def note(self, told: str) -> None:
        """Says something once, of however many files it is true."""
        if told not in self.notes:
            self.notes.append(told)

    def key(self, role: str, row: Row) -> str:
        """The key under which a row holds a role; "" where it holds none."""
        keys = tuple(row)
        if (role, keys) not in self._known:
            lower = {key.lower().replace(" ", "_"): key for key in reversed(keys) if isinstance(key, str) and key}
            named = getattr(self.fields, role)
            wanted = (named,) if named else (role, *CALLED[role])
            found = named if named and named in row else next((lower[name] for name in wanted if name in lower), "")
            self._known[role, keys] = found
        return self._known[role, keys]

    def get(self, role: str, row: Row) -> object:
        key = self.key(role, row)
        return row[key] if key else None

    def check_named(self, row: Row, where: str) -> None:
        """Raises `DataError` for a name of the settings that the first row does not have."""
        for role, named in self.fields:
            label = role == "domain" and self.labelled
            if named and (label or role not in MAY_BE_ABSENT) and not self.key(role, row):
                setting = "data.partition.by" if label else f"data.fields.{role}"
                columns = ", ".join(str(key) for key in row)
                raise DataError(f"{where}: {setting} = {named!r} is none of its columns: {columns}")

    def user(self, row: Row, where: str) -> str:
        """Whose row this is: "" in a file that names nobody. Raises `DataError` where only some rows name somebody."""
        found = name(self.get("user", row), where, "user")
        if self.fields.user and not found:
            raise DataError(f"{where}: data.fields.user = {self.fields.user!r} is empty; name a user in every row")
        if self._named is not None and self._named != bool(found):
            raise DataError(f"{where}: a user is named in some rows only; name one in every row, or in none")
        self._named = bool(found)
        return found

    def time(self, row: Row, where: str) -> float:
        value = self.get("time", row)
        timed = value not in (None, "")
        if self._timed is not None and self._timed != timed:
            raise DataError(f"{where}: some rows have a time and others none; give one in every row, or in none")
        self._timed = timed
        return moment(value, where) if timed else 0.0

    def told(self) -> str:
        """One line for people: what a file was taken for, how much was read, and whose replies are learned."""
        line = f"read as {self.read_as}: {self.conversations:,} conversations"
        if self.by_role:
            line += f", {WHOSE[self.replies]}"
        return "; ".join([line, *self.notes])

    def take_for(self, told: str) -> None:
        """Notes what a file is; raises `DataError` where the settings name columns and it has none."""
        if named := [role for role, name in self.fields if name]:
            setting = "data.partition.by" if self.labelled and named == ["domain"] else f"data.fields.{named[0]}"
            raise DataError(f"{setting} = {getattr(self.fields, named[0])!r}: {told} has no columns; leave it out")
        self.read_as = told

    def check_replies(self) -> None:
        """Raises `DataError` where the human's replies are asked for and nothing says who is human."""
        if self.replies == "user" and not self.by_role:
            raise DataError(
                f"data.replies = 'user' is of chats whose turns have roles; {self.read_as} has none: leave it out"
                + (", or swap which columns are prompt and response" if "respon" in self.read_as else "")
            )

    def problems(self) -> Iterator[str]:
        """The five commonest reasons for leaving something out, each with the place where it was met first."""
        for reason, count in self.left_out.most_common(5):
            yield f"{count:,} × {reason}{FIRST}{self.first[reason]}"

    def conversation(self, where: str, said: list[tuple[bool, str, float]], user: str, domain: str) -> Conversation:
        """Turns, of which those marked are replies to learn: of the user where one is named, else of nobody."""
        learned, other = (user, "") if user else ("", "asker")
        turns = merge_turns([Turn(learned if mark else other, text, time) for mark, text, time in said])
        return Conversation(where, turns, domain, None if user else "")


def text(value: object, where: str, key: str) -> str:
    """A text, or nothing as the empty one; a list or a group never becomes a text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} = {shown(value)} must be a text")
    return value


def name(value: object, where: str, key: str) -> str:
    """A text, or a whole number as one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text(value, where, key).strip()


def domain_of(row: Row, where: str, reading: Reading) -> str:
    """What a row is about, where it says so in a text or a whole number."""
    found = reading.get("domain", row)
    return name(found, where, "domain") if isinstance(found, str | int) else ""
