"""WhatsApp's exported chats: a line begins with date, time and name, in the order and marks of the phone's locale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from florilegium.simulation.data.conversations import Conversation
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.formats.messages import Message, paired
from florilegium.simulation.data.formats.opened import lines_of
from florilegium.simulation.data.formats.reading import Reading

MARKS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # directions, which the app writes around names
STAMP = re.compile(
    r"^\[?(\d{1,4})([./-])(\d{1,2})\2(\d{2,4}),?\s+(\d{1,2})[:.](\d{2})(?:[:.](\d{2}))?"
    r"(?:\s*([AaPp])\.?\s?[Mm]\.?)?(?:\]|\s+-)\s+(.*)$"
)
MEDIA = re.compile(
    r"^<[^<>]*(omitted|ausgeschlossen|weggelassen|omitidos?|omis|omessi|omessa|attached|angehängt)[^<>]*>$"
    r"|^(image|video|audio|sticker|gif|document|contact card) omitted$"
    r"|^(bild|video|audio|sticker|gif|dokument|kontaktkarte) weggelassen$"
    r"|^(this message was deleted|you deleted this message|diese nachricht wurde gelöscht)\.?$"
    r"|^.*\((file attached|datei angehängt)\)$|^null$|^(missed|verpasster) (voice|video|sprach|video)[- ]?(call|anruf)",
    re.IGNORECASE,
)
EDITED = re.compile(r"\s*<(this message was edited|diese nachricht wurde bearbeitet)\.?>$", re.IGNORECASE)
OF_THE_APP = "\u200e"  # before what the app has written in a person's place
Stamped = tuple[int, re.Match[str], str]  # number of its first line, its stamp, all that was written


def looks_like_whatsapp(start: str) -> bool:
    """Whether one of the first lines is stamped as the app does."""
    return any(STAMP.match(MARKS.sub("", line)) for line in start.splitlines()[:5])


def read_whatsapp(path: Path, reading: Reading) -> Iterator[Conversation]:
    """The file is one conversation; notices of the app and what was left out of the export are counted."""
    stamped = list(_stamped(path))
    order = _order(path, stamped)
    return paired(_messages(path, stamped, order, reading), reading)


def _stamped(path: Path) -> Iterator[Stamped]:
    held: Stamped | None = None
    for number, raw in lines_of(path):
        line = MARKS.sub("", raw).replace("\u202f", " ").replace("\xa0", " ")
        if stamp := STAMP.match(line):
            if held:
                yield held
            _, _, said = raw.partition(": ")
            held = (number, stamp, "" if said.startswith(OF_THE_APP) and not EDITED.search(line) else stamp[9])
        elif held:
            held = (held[0], held[1], f"{held[2]}\n{line}")
        elif line.strip():
            raise DataError(f"{path}, line {number}: stands before the first message; expected date, time and name")
    if held:
        yield held


def _order(path: Path, stamped: list[Stamped]) -> str:
    """Which of day, month and year comes first: as the numbers of the whole file say, else as the marks do."""
    if any(len(stamp[1]) == 4 for _, stamp, _ in stamped):
        return "ymd"
    day_first = next((n for n, stamp, _ in stamped if int(stamp[1]) > 12), 0)
    month_first = next((n for n, stamp, _ in stamped if int(stamp[3]) > 12), 0)
    if day_first and month_first:
        raise DataError(f"{path}, lines {day_first} and {month_first}: dates in two orders; export the chat anew")
    if day_first or month_first:
        return "dmy" if day_first else "mdy"
    american = any(stamp[2] == "/" and stamp[8] for _, stamp, _ in stamped)
    return "mdy" if american else "dmy"


def _messages(path: Path, stamped: list[Stamped], order: str, reading: Reading) -> Iterator[Message]:
    for number, stamp, written in stamped:
        where = f"{path}, line {number}"
        who, colon, said = written.partition(": ")
        said = EDITED.sub("", said)
        if not colon or "\n" in who or '"' in who or "“" in who:
            reading.leave_out("notice of the app", where)
        elif MEDIA.match(said.strip()):
            reading.leave_out("media left out of the export, or a deleted message", where)
        else:
            yield Message(who.strip(), said, _time(stamp, order, where), where)


def _time(stamp: re.Match[str], order: str, where: str) -> float:
    numbers = dict(zip(order, (int(stamp[1]), int(stamp[3]), int(stamp[4])), strict=True))
    year = numbers["y"] + (2000 if numbers["y"] < 100 else 0)
    hour = int(stamp[5])
    if stamp[8]:
        hour = hour % 12 + (12 if stamp[8] in "pP" else 0)
    try:
        at = datetime(year, numbers["m"], numbers["d"], hour, int(stamp[6]), int(stamp[7] or 0), tzinfo=UTC)
    except ValueError as error:
        raise DataError(f"{where}: no such date or time ({error})") from None
    return at.timestamp()
