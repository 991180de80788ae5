"""WhatsApp's exported chats: a line begins with date, time and name, in the order and marks of the phone's locale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from florilegium.simulation.data.conversations import Conversation
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.formats.messages import Message, paired
from florilegium.simulation.data.formats.opened import lines_of
from florilegium.simulation.data.formats.reading import Reading

MARKS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # directions, which the app writes around names
STAMP = re.compile(
    r"^\[?(?P<first>\d{1,4})(?P<mark>[./-])\s?(?P<second>\d{1,2})(?P=mark)\s?(?P<third>\d{1,4})\.?(?:\s?г\.)?,?\s+"
    r"(?:(?:à|às|kl\.?|klo|om|um)\s+)?(?:(?P<half>오전|오후|上午|下午|午前|午後)\s?)?"
    r"(?P<hour>\d{1,2})[:.](?P<minute>\d{2})(?:[:.](?P<seconds>\d{2}))?"
    r"(?:\s*(?P<am_pm>[AaPp])\.?\s?[Mm]\.?|\s*Uhr)?(?:\]|\s+-)\s+(?P<said>.*)$"
)
AFTERNOON = {"오후", "下午", "午後"}
LIKE_A_STAMP = re.compile(r"^\[?\w{1,4}[./-]\s?\w{1,4}[./-]\s?\w{2,4}\b.{0,24}?(?:\]|\s-)\s[^:]{1,60}: ")
MEDIA = re.compile(
    r"^<[^<>\n]{1,60}>$"  # <Media omitted>, in any language
    r"|^(image|video|audio|sticker|gif|document|contact card) omitted$"
    r"|^(bild|video|audio|sticker|gif|dokument|kontaktkarte) weggelassen$"
    r"|^(this message was deleted|you deleted this message|diese nachricht wurde gelöscht"
    r"|(se eliminó|eliminaste) este mensaje|este mensaje fue eliminado"
    r"|mensagem apagada|(essa|esta) mensagem foi apagada|você apagou (essa|esta) mensagem"
    r"|ce message a été supprimé|vous avez supprimé ce message"
    r"|questo messaggio è stato eliminato|hai eliminato questo messaggio"
    r"|(данное|это) сообщение удалено|вы удалили (данное|это) сообщение"
    r"|dit bericht (is|werd) verwijderd|je hebt dit bericht verwijderd"
    r"|bu mesaj silindi|bu mesajı sildiniz|ta wiadomość została usunięta|usunięto tę wiadomość"
    r"|pesan ini (telah )?dihapus|anda menghapus pesan ini)\.?$"
    r"|^.*\((file attached|datei angehängt|archivo adjunto|arquivo anexado|fichier joint|file allegato"
    r"|bestand bijgevoegd|файл добавлен)\)$"
    r"|^null$|^(missed|verpasster) (voice|video|sprach|video)[- ]?(call|anruf)",
    re.IGNORECASE,
)
EDITED = re.compile(r"\s*<(this message was edited|diese nachricht wurde bearbeitet)\.?>$", re.IGNORECASE)
DAY_S = 86_400
OF_THE_APP = "\u200e"  # before what the app has written in a person's place
Stamped = tuple[int, re.Match[str], str]  # number of its first line, its stamp, all that was written


def looks_like_whatsapp(start: str) -> bool:
    """Whether one of the first lines is stamped as the app does."""
    return any(STAMP.match(MARKS.sub("", line)) for line in start.splitlines()[:5])


def looks_like_another_chat(start: str) -> bool:
    """Whether the first line has something like a date, and a name before what is said."""
    return bool(LIKE_A_STAMP.match(MARKS.sub("", start.partition("\n")[0]).strip()))


def read_whatsapp(path: Path, reading: Reading) -> Iterator[Conversation]:
    """The file is one conversation; notices of the app and what was left out of the export are counted."""
    stamped = _of_one_form(list(stamped_lines(path)))
    order = _order(path, stamped, reading)
    return paired(_messages(path, stamped, order, reading), reading)


def _of_one_form(stamped: list[Stamped]) -> list[Stamped]:
    """With the year first in all dates or in none: lines of the rarer form were pasted into the message before."""
    year_first = sum(len(stamp["first"]) == 4 for _, stamp, _ in stamped) * 2 > len(stamped)
    kept: list[Stamped] = []
    for number, stamp, written in stamped:
        if not kept or (len(stamp["first"]) == 4) == year_first:
            kept.append((number, stamp, written))
        else:
            before = kept[-1]
            pasted = stamp.string + written.removeprefix(stamp["said"])
            kept[-1] = (before[0], before[1], f"{before[2]}\n{pasted}")
    return kept


def stamped_lines(path: Path) -> Iterator[Stamped]:
    """Messages with the number of their first line, their stamp, and name and text over all their lines."""
    held: Stamped | None = None
    for number, raw in lines_of(path):
        line = MARKS.sub("", raw).replace("\u202f", " ").replace("\xa0", " ")
        if stamp := STAMP.match(line):
            if held:
                yield held
            _, _, said = raw.partition(": ")
            held = (number, stamp, "" if said.startswith(OF_THE_APP) and not EDITED.search(line) else stamp["said"])
        elif held:
            held = (held[0], held[1], f"{held[2]}\n{line}")
        elif line.strip():
            raise DataError(f"{path}, line {number}: stands before the first message; expected date, time and name")
    if held:
        yield held


def _order(path: Path, stamped: list[Stamped], reading: Reading) -> str:
    """Which of day, month and year comes first: as the setting says, else as the whole file does.

    A number above 12 is a day. Else messages stand in the order of time, which mostly one order of the dates alone
    keeps. Where both do, the marks decide, and it is told.
    """
    if any(len(stamp["first"]) == 4 for _, stamp, _ in stamped):
        return "ymd"
    if reading.dates != "auto":
        return "dmy" if reading.dates == "day-first" else "mdy"
    day_first = next((n for n, stamp, _ in stamped if int(stamp["first"]) > 12), 0)
    month_first = next((n for n, stamp, _ in stamped if int(stamp["second"]) > 12), 0)
    if day_first and month_first:
        raise DataError(f"{path}, lines {day_first} and {month_first}: dates in two orders; export the chat anew")
    if day_first or month_first:
        return "dmy" if day_first else "mdy"
    if all(stamp["first"] == stamp["second"] for _, stamp, _ in stamped):
        return "dmy"
    back = {order: _steps_back(path, stamped, order) for order in ("dmy", "mdy")}
    if back["dmy"] != back["mdy"]:
        return min(back, key=lambda order: back[order])
    american = any(stamp["mark"] == "/" and stamp["am_pm"] for _, stamp, _ in stamped)
    reading.note(
        "nothing says whether day or month comes first in its dates: taken are "
        + ("months; data.dates=day-first else" if american else "days; data.dates=month-first else")
    )
    return "mdy" if american else "dmy"


def _steps_back(path: Path, stamped: list[Stamped], order: str) -> int:
    """How many messages are of an earlier day than the one before them."""
    times = [time_of(stamp, order, f"{path}, line {number}") // DAY_S for number, stamp, _ in stamped]
    return sum(later < earlier for earlier, later in pairwise(times))


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
            yield Message(who.strip(), said, time_of(stamp, order, where), where)


def time_of(stamp: re.Match[str], order: str, where: str) -> float:
    """Seconds since the epoch, given which of day, month and year comes first."""
    numbers = dict(zip(order, (int(stamp["first"]), int(stamp["second"]), int(stamp["third"])), strict=True))
    year = numbers["y"] + (2000 if numbers["y"] < 100 else 0)
    hour = int(stamp["hour"])
    if stamp["am_pm"] or stamp["half"]:
        later = (stamp["am_pm"] or "").lower() == "p" or stamp["half"] in AFTERNOON
        hour = hour % 12 + 12 * later
    try:
        at = datetime(
            year, numbers["m"], numbers["d"], hour, int(stamp["minute"]), int(stamp["seconds"] or 0), tzinfo=UTC
        )
    except ValueError as error:
        raise DataError(f"{where}: no such date or time ({error})") from None
    return at.timestamp()
