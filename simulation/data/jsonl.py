"""Reader of the project's own schema: one reply of a user per line.

    {"user": "ana", "time": "2024-05-01T09:30:00Z", "prompt": "Tea?", "response": "Green, please.", "domain": "kitchen"}

`user`, `prompt` and `response` are required strings (a user may also be an integer). `time` is seconds or milliseconds
since the epoch or ISO 8601, UTC where it names no zone; every line has one or none has. Lines without times, or of the
same time, are in order as they stand. `domain` may be left out. Not covered: conversations of more than one exchange to
a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

from florilegium.simulation.data.conversations import Conversation, Turn
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import Row, json_lines, shown
from florilegium.simulation.data.synonyms import hint, most_telling

MILLISECONDS_FROM = 1e11  # seconds until the year 5138: what is beyond is in milliseconds
FAR_FUTURE_S = 253_402_300_800  # the year 10,000
KEYS = ("user", "time", "prompt", "response", "domain")


def read_jsonl(path: Path) -> Iterator[Conversation]:
    """Each line as a conversation of two turns: the prompt, and the user's reply.

    Raises `DataError` with the file and the line for a line outside the schema.
    """
    timed: bool | None = None
    for number, row in json_lines(path):
        yield exchange(row, f"{path}, line {number}", timed, f"{path.name}:{number}")
        timed = has_time(row)
    if timed is None:
        raise DataError(f"{path} holds no line; expected one JSON object a line with user, prompt and response")


def exchange(row: Row, where: str, timed: bool | None, identity: str = "") -> Conversation:
    """The conversation of one line; `timed` says whether the lines before have times, None where there are none.

    Raises `DataError` for a line outside the schema.
    """
    _check(row, where)
    if timed is not None and has_time(row) != timed:
        other = "has no time, but the lines before do" if timed else "has a time, but the lines before have none"
        raise DataError(f"{where}: {other}; give `time` on every line or on none")
    time = moment(row["time"], where) if has_time(row) else 0.0
    turns = (Turn("", row["prompt"] or "", time), Turn(str(row["user"]), row["response"] or "", time))
    return Conversation(identity, turns, row.get("domain") or "")


def has_time(row: Row) -> bool:
    return row.get("time") is not None


def seconds(value: object) -> float:
    """Seconds since the epoch of a finite number, a date or an ISO 8601 text; raises `ValueError` for the rest."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < FAR_FUTURE_S:
        return float(value)
    raise ValueError(f"{shown(value)} is not a time in seconds")


def _check(row: Row, where: str) -> None:
    """Refuses unknown keys, wrong types and missing keys."""
    if unknown := most_telling(key for key in row if key not in KEYS):
        raise DataError(f"{where}: unknown key {shown(unknown)}; {hint(unknown, KEYS, row)}")
    for key in ("user", "prompt", "response", "domain"):
        _check_text(key, row.get(key), where)
    for key in ("prompt", "response"):
        if key not in row:
            raise DataError(f"{where}: {key!r} is missing; every line needs user, prompt and response")
    if row.get("user") in ("", None):
        lacks = "user = '' must be a text that is not empty, or an integer" if "user" in row else "'user' is missing"
        raise DataError(
            f"{where}: {lacks}. If nobody knows who wrote what, give lines that are to be on one device the same "
            f"'user': a number will do"
        )


def _check_text(key: str, value: object, where: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not isinstance(value, str) and not (key == "user" and whole):
        expected = "a text or an integer" if key == "user" else "a text"
        raise DataError(f"{where}: {key} = {shown(value)} must be {expected}")


def _is_a_date(value: str) -> bool:
    """Whether a text of eight digits is a day of ISO 8601, such as 20240501; as seconds it would be in 1970."""
    try:
        return bool(re.fullmatch(r"\s*\d{8}\s*", value) and date.fromisoformat(value.strip()))
    except ValueError:
        return False


def moment(value: object, where: str) -> float:
    """Seconds since the epoch of a number of seconds or milliseconds, or ISO 8601; UTC where no zone is named."""
    number = value
    if isinstance(value, str):
        try:
            number = value.strip() if _is_a_date(value) else float(value)
        except ValueError:
            number = value.strip()
    try:
        if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) >= MILLISECONDS_FROM:
            number = number / 1000
        if isinstance(number, datetime) and number.tzinfo is None:
            number = number.replace(tzinfo=UTC)
        return seconds(number)
    except (ValueError, OverflowError):
        raise DataError(
            f"{where}: time = {shown(value)} must be seconds or milliseconds since the epoch, or ISO 8601, "
            "as 2024-05-01T09:30:00Z"
        ) from None
