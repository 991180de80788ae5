"""Logs of messages: who answered what. Chat exports and mail become such logs first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from florilegium.simulation.data.conversations import Conversation, Turn
from florilegium.simulation.data.formats.reading import Located, Reading, domain_of, name, text

CONTEXT_TURNS = 16  # kept before a reply; data.context_turns takes the last ones of them


@dataclass(frozen=True, slots=True)
class Message:
    """What somebody wrote at a time. `reply_to` is the `id` of what it answers, "" where that is not said."""

    user: str
    text: str
    time: float
    where: str
    conversation: str = ""
    id: str = ""
    reply_to: str = ""
    label: str = ""  # a domain that the settings name a column of; else the conversation is


Named = dict[tuple[str, str], Message]


def read_log(rows: Iterable[Located], reading: Reading) -> Iterator[Conversation]:
    """Rows of user and text, with time, conversation, id and reply_to where there are such."""
    return paired(_messages(rows, reading), reading)


def _messages(rows: Iterable[Located], reading: Reading) -> Iterator[Message]:
    for where, row in rows:
        answered = reading.get("reply_to", row)
        if isinstance(answered, list):
            answered = answered[0] if answered else None
        yield Message(
            name(reading.get("user", row), where, "user"),
            text(reading.get("text", row), where, "text"),
            reading.time(row, where),
            where,
            name(reading.get("conversation", row), where, "conversation"),
            name(reading.get("id", row), where, "id"),
            name(answered, where, "reply_to"),
            domain_of(row, where, reading) if reading.fields.domain else "",
        )


def paired(messages: Iterable[Message], reading: Reading) -> Iterator[Conversation]:
    """Each reply with what it answers: the message that it names, else the last of somebody else, if recent enough.

    Messages that one person sends one after the other, and that name nothing, are one reply.
    """
    by_conversation: dict[str, list[Message]] = {}
    recorded: dict[tuple[str, str, float, str], Message] = {}
    named_too: list[Message] = []  # what was recorded before, under the ids that it has here
    for message in messages:
        said = by_conversation.setdefault(message.conversation, [])
        record = (message.conversation, message.user, message.time, message.text.strip())
        before = recorded.get(record)
        if not message.user:
            reading.leave_out("message of nobody", message.where)
        elif not message.text.strip():
            reading.leave_out("message without text", message.where)
        elif before and (message.time or said[-1] is before):  # without times, "ok" may be said again later
            reading.leave_out("message recorded twice", message.where)
            if message.id != before.id:
                named_too.append(replace(before, id=message.id))
        else:
            recorded[record] = message
            said.append(message)
    named = _named(m for said in (*by_conversation.values(), named_too) for m in said if m.id)
    for conversation, said in by_conversation.items():
        yield from _replies(conversation, sorted(said, key=lambda m: m.time), named, reading)


def _named(messages: Iterable[Message]) -> Named:
    """Messages by conversation and id, but none whose id occurs twice there.

    Where no id occurs in two conversations, they are counted over all of the file: then by ("", id) too.
    """
    found: dict[tuple[str, str], list[Message]] = {}
    for message in messages:
        found.setdefault((message.conversation, message.id), []).append(message)
    once = {key: same[0] for key, same in found.items() if len(same) == 1}
    if len({identity for _, identity in found}) < len(found):
        return once
    return once | {("", identity): message for (_, identity), message in once.items()}


def _replies(conversation: str, said: list[Message], named: Named, reading: Reading) -> Iterator[Conversation]:
    before: list[Message] = []  # what was said by turns, each joined
    for turn in _joined(said, reading.reply_within_s):
        answered = named.get((turn.conversation, turn.reply_to)) or named.get(("", turn.reply_to))
        if answered is not None and answered.user != turn.user:
            context = [answered]
        else:
            context = before[-CONTEXT_TURNS:]
            if not context or context[-1].user == turn.user:
                reading.leave_out("message that answers nobody", turn.where)
                context = []
            elif turn.time - context[-1].time > reading.reply_within_s:
                reading.leave_out("message that comes later than data.reply_within_s", turn.where)
                context = []
        if context:
            earlier = tuple(Turn("", m.text, m.time) for m in context)
            said_then = (*earlier, Turn(turn.user, turn.text, turn.time))
            yield Conversation(turn.where, said_then, turn.label or conversation)
        before.append(turn)


def _joined(said: list[Message], within_s: float) -> Iterator[Message]:
    """Messages of one person that follow each other and name nothing, as one, of the time of the first."""
    run: list[Message] = []
    for message in said:
        first = run[0] if run else message
        near, named = message.time - first.time <= within_s, message.reply_to or first.reply_to
        if run and (not near or named or first.user != message.user):
            yield replace(first, text="\n".join(m.text for m in run))
            run = []
        run.append(message)
    if run:
        yield replace(run[0], text="\n".join(m.text for m in run))
