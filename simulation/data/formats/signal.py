"""Signal: what the app exports itself (`main.jsonl`), and what the program signal-export writes (JSON or Markdown).

The app's lines are the frames of its backups (`Backups.proto` of Signal-Desktop) in protobuf's JSON, where whole
numbers are texts. Not covered: encrypted backups, which hold no text without their key, and what of a very long
message lies in a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import Row, shown
from florilegium.simulation.data.formats.messages import Message
from florilegium.simulation.data.formats.reading import Reading, name, text
from florilegium.simulation.data.formats.whatsapp import stamped_lines, time_of
from florilegium.simulation.data.jsonl import moment

FRAMES = {
    "account", "recipient", "chat", "chatItem", "stickerPack", "adHocCall", "notificationProfile", "chatFolder",
}  # fmt: skip
WRITTEN = {"date", "sender", "body", "quote", "reactions", "attachments"}
NOBODY = "No-Sender"
DELETED = "(This message was deleted)"
BESIDE = re.compile(  # reactions, a sticker, attachments
    r"\n\(- .* -\)|\n\(\( .* \)\)|!?\[[^\]\n]*\]\((?:\./media|\.\./exported_stickers|media)/[^)\n]*\)"
)


def is_signal(value: Any) -> bool:
    """A frame of the app's export, or what stands before the first."""
    if not isinstance(value, dict):
        return False
    frame = len(value) == 1 and value.keys() <= FRAMES and all(isinstance(part, dict) for part in value.values())
    return frame or {"version", "backupTimeMs"} <= value.keys()


def is_signal_export(value: Any) -> bool:
    """A message as signal-export writes it."""
    return isinstance(value, dict) and value.keys() >= WRITTEN


def signal(documents: Iterable[tuple[str, Any]], reading: Reading, chat: str = "") -> Iterator[Message]:
    """Each message under its author's number in the file; a quote names what it answers."""
    for place, frame in documents:
        if not isinstance(frame, dict):
            raise DataError(f"{place}: {shown(frame)} is no frame of Signal's export")
        item = frame.get("chatItem")
        if item is None:
            continue  # people, chats and settings
        said = _part(item, "standardMessage", place) if isinstance(item, dict) else {}
        if not said:
            reading.leave_out("notice of the app, or a sticker, call or deleted message", place)
            continue
        conversation, author = name(item.get("chatId"), place, "chatId"), name(item.get("authorId"), place, "authorId")
        quote = _part(said, "quote", place)
        answered = name(quote.get("targetSentTimestamp"), place, "targetSentTimestamp")
        yield Message(
            author,
            text(_part(said, "text", place).get("body"), place, "body"),
            moment(item.get("dateSent"), place),
            place,
            conversation,
            f"{author}:{name(item.get('dateSent'), place, 'dateSent')}",
            f"{name(quote.get('authorId'), place, 'authorId')}:{answered}" if answered else "",
        )


def _part(row: Row, key: str, place: str) -> Row:
    found = row.get(key) or {}
    if not isinstance(found, dict):
        raise DataError(f"{place}: {key} = {shown(found)} must be an object")
    return found


def signal_export(documents: Iterable[tuple[str, Any]], reading: Reading, chat: str = "") -> Iterator[Message]:
    """Each message under its sender's name; what it quotes is left out of its text."""
    for place, row in documents:
        if not is_signal_export(row):
            raise DataError(f"{place}: {shown(row)} is no message of signal-export")
        if row.get("deleted") or row.get("call"):
            reading.leave_out("call or deleted message", place)
            continue
        sender = name(row["sender"], place, "sender")
        at = moment(row["date"], place)
        yield Message("" if sender == NOBODY else sender, text(row["body"], place, "body").strip(), at, place, chat)


def signal_markdown(path: Path, reading: Reading, chat: str = "") -> Iterator[Message]:
    """As signal-export's JSON, from a `chat.md`: lines that begin with `[2024-05-01 09:00:00] name:`."""
    for number, stamp, written in stamped_lines(path):
        where = f"{path}, line {number}"
        sender, _, said = written.partition(":")
        own = "\n".join(line for line in BESIDE.sub("", said).split("\n") if not line.startswith("> ")).strip()
        if own == DELETED:
            reading.leave_out("call or deleted message", where)
        else:
            yield Message("" if sender == NOBODY else sender.strip(), own, time_of(stamp, "ymd", where), where, chat)
