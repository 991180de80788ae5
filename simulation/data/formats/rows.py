"""Rows that hold whole exchanges: chats of OpenAI and ShareGPT, Alpaca, pairs, preferences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from florilegium.simulation.data.conversations import Conversation
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import Row, shown
from florilegium.simulation.data.formats.reading import ROLES, Located, Reading, domain_of, text

OTHER_ROLES = {"system", "developer", "tool", "function", "function_call", "observation"}  # any other may be a name
SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def read_openai(rows: Iterable[Located], reading: Reading) -> Iterator[Conversation]:
    """`messages` of role and content; a content may be a list of parts, of which those of text are read."""
    for where, row in rows:
        yield from _chat(where, row, _list(row, "messages", where), ("role", "content"), reading)


def read_sharegpt(rows: Iterable[Located], reading: Reading) -> Iterator[Conversation]:
    """`conversations` of from and value, or of role and content."""
    for where, row in rows:
        turns = _list(row, "conversations", where)
        keys = ("role", "content") if turns and "role" in turns[0] else ("from", "value")
        yield from _chat(where, row, turns, keys, reading)


def _chat(where: str, row: Row, turns: list[Row], keys: tuple[str, str], reading: Reading) -> Iterator[Conversation]:
    reading.by_role = True
    said: list[tuple[bool, str, float]] = []
    time, user = reading.time(row, where), reading.user(row, where)
    for n, turn in enumerate(turns, start=1):
        place = f"{where}, turn {n}"
        role = text(turn.get(keys[0]), place, keys[0]).strip().lower()
        if role not in ROLES["assistant"] | ROLES["user"]:
            reading.leave_out(f"turn of the role {role!r}" if role in OTHER_ROLES else "turn of another role", place)
            continue
        written = _written(turn.get(keys[1]), place, keys[1])
        if turn.get("tool_calls") or turn.get("function_call"):
            reading.leave_out("tool call", place)
        elif not written.strip():
            reading.leave_out("empty turn", place)
        if written.strip():
            said.append((role in ROLES[reading.replies], written, time))
    if said:
        yield reading.conversation(where, said, user, domain_of(row, where, reading))
    else:
        reading.leave_out("conversation without turns", where)


def _written(value: object, where: str, key: str) -> str:
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and part.get("type") == "text"]
        return "\n".join(text(part.get("text"), where, key) for part in parts)
    return text(value, where, key)


def _list(row: Row, key: str, where: str) -> list[Row]:
    found = row.get(key)
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise DataError(f"{where}: {key} = {shown(found)} must be a list of turns")
    return found


def read_pairs(rows: Iterable[Located], reading: Reading) -> Iterator[Conversation]:
    """A prompt and a response, under whatever names."""
    return _exchanges(rows, reading, lambda row, where: _of(reading, "prompt", row, where))


def read_alpaca(rows: Iterable[Located], reading: Reading) -> Iterator[Conversation]:
    """An instruction, mostly with an input or a context, and an output."""

    def prompt(row: Row, where: str) -> str:
        parts = [text(row.get(key), where, key) for key in ("instruction", "input", "context")]
        return "\n".join(part for part in parts if part.strip())

    return _exchanges(rows, reading, prompt)


def _exchanges(rows: Iterable[Located], reading: Reading, prompt: Callable[[Row, str], str]) -> Iterator[Conversation]:
    for where, row in rows:
        asked, answer = prompt(row, where), _of(reading, "response", row, where)
        user, time = reading.user(row, where), reading.time(row, where)
        if asked.strip() and answer.strip():
            yield reading.conversation(
                where, [(False, asked, time), (True, answer, time)], user, domain_of(row, where, reading)
            )
        else:
            reading.leave_out(f"row without {'reply' if asked.strip() else 'prompt'}", where)


def read_preferences(rows: Iterable[Located], reading: Reading) -> Iterator[Conversation]:
    """What was chosen is the reply; what was rejected is left out. Chats of both share their beginning.

    Either is a text, a list of turns, or a talk as one text, of which each reply of the assistant's is one.
    """
    if named := reading.fields.response:
        raise DataError(
            f"data.fields.response = {named!r}: of preference pairs what was chosen is learned; leave it out"
        )
    for where, row in rows:
        chosen = row.get("chosen")
        spoken = transcript(chosen) if isinstance(chosen, str) else []
        if spoken or isinstance(chosen, list):
            turns = spoken or _list(row, "chosen", where)
            yield from _chat(where, row, [*_asked(row, turns), *turns], ("role", "content"), reading)
        else:
            pair = {**{key: row[key] for key in row if key not in ("chosen", "rejected")}, "response": chosen}
            yield from read_pairs([(where, pair)], reading)


def transcript(text: str) -> list[Row]:
    """The turns of a talk that was written down as one text, as that of hh-rlhf; [] of any other text.

    >>> transcript("\\n\\nHuman: Tea?\\n\\nAssistant: Green.")
    [{'role': 'user', 'content': 'Tea?'}, {'role': 'assistant', 'content': 'Green.'}]
    """
    before, *said = SPEAKER.split(text)
    if before.strip() or "Human" not in said[::2] or "Assistant" not in said[::2]:
        return []
    roles = ("user" if who == "Human" else "assistant" for who in said[::2])
    return [{"role": role, "content": what.strip()} for role, what in zip(roles, said[1::2], strict=True)]


def _asked(row: Row, turns: list[Row]) -> list[Row]:
    """The turns of a prompt that stands beside what was chosen, where that does not begin with it."""
    asked = row.get("prompt") or []
    before = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    spoken = [turn for turn in turns if turn.get("role") != "system"] if isinstance(asked, str) else turns
    same = [_said(turn) for turn in spoken[: len(before)]] == [_said(turn) for turn in before]
    return [] if same else before


def _said(turn: Row) -> tuple[object, object]:
    content = turn.get("content")
    return turn.get("role"), content.strip() if isinstance(content, str) else content


def _of(reading: Reading, role: str, row: Row, where: str) -> str:
    return text(reading.get(role, row), where, reading.key(role, row) or role)
