"""Reader of the project's own schema: one reply of a user per line.

    {"user": "ana", "time": "2024-05-01T09:30:00Z", "prompt": "Tea?", "response": "Green, please.", "domain": "kitchen"}

`user`, `prompt` and `response` are required strings (a user may also be an integer). `time` is seconds since the
epoch or ISO 8601, UTC where it names no zone; every line has one or none has, and then the order of the lines counts.
`domain` may be left out. Not covered: conversations of more than one exchange to a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path

from simulation.data.conversations import Conversation, Turn
from simulation.data.errors import DataError
from simulation.data.folder import Row, json_lines

KEYS = ("user", "time", "prompt", "response", "domain")


def read_jsonl(path: Path) -> Iterator[Conversation]:
    """Each line as a conversation of two turns: the prompt, and the user's reply.

    Raises `DataError` with the file and the line for a line outside the schema, and for a user all of whose lines
    are empty.
    """
    spoke: dict[str, bool] = {}
    timed: bool | None = None
    for number, row in json_lines(path):
        where = f"{path}, line {number}"
        _check(row, where)
        has_time = row.get("time") is not None
        if timed is not None and has_time != timed:
            other = "has a time, but the lines before have none" if has_time else "has no time, but the lines before do"
            raise DataError(f"{where}: {other}; give `time` on every line or on none")
        timed = has_time
        user, prompt, response = str(row["user"]), row["prompt"], row["response"]
        spoke[user] = spoke.get(user, False) or bool(prompt.strip() and response.strip())
        time = _time(row, where) if has_time else float(number)
        turns = (Turn("", prompt, time), Turn(user, response, time))
        yield Conversation(f"{path.name}:{number}", turns, row.get("domain") or "")
    _refuse_silence(spoke, path)


def seconds(value: object) -> float:
    """Seconds since the epoch of a finite number, a datetime or an ISO 8601 text; raises `ValueError` for the rest."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ValueError(f"{value!r} is not a time")


def _check(row: Row, where: str) -> None:
    """Refuses unknown keys, missing ones and wrong types."""
    for key in row:
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(KEYS)}"
            raise DataError(f"{where}: unknown key {key!r}; {hint}")
    for key in ("user", "prompt", "response"):
        if key not in row:
            raise DataError(f"{where}: {key!r} is missing; every line needs user, prompt and response")
    user = row["user"]
    if isinstance(user, bool) or not isinstance(user, str | int) or user == "":
        raise DataError(f"{where}: user = {user!r} must be a text that is not empty, or an integer")
    for key in ("prompt", "response", "domain"):
        value = row.get(key)
        if not isinstance(value, str) and not (key == "domain" and value is None):
            raise DataError(f"{where}: {key} = {value!r} must be a text")


def _time(row: Row, where: str) -> float:
    try:
        return seconds(row["time"])
    except ValueError:
        raise DataError(
            f"{where}: time = {row['time']!r} must be seconds since the epoch or ISO 8601, as 2024-05-01T09:30:00Z"
        ) from None


def _refuse_silence(spoke: dict[str, bool], path: Path) -> None:
    """A file of nothing, and a user of nothing, are mistakes of whoever wrote the file."""
    if not spoke:
        raise DataError(f"{path} holds no line; expected one JSON object a line with user, prompt and response")
    for user, said_something in spoke.items():
        if not said_something:
            raise DataError(f"{path}: every line of user {user!r} has an empty prompt or response; fill or remove them")
