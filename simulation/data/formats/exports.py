"""Exports of Telegram, Slack and Discord, as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import shown
from florilegium.simulation.data.formats.messages import Message
from florilegium.simulation.data.formats.reading import Reading, name, text
from florilegium.simulation.data.jsonl import moment

Document = tuple[str, Any]  # where it stands, and what was parsed
MARK = re.compile(r"<([@#!]?)([^<>|]+)(?:\|([^<>]*))?>")  # in Slack's texts, where a bracket of a person's is &lt;
FORWARDED = {"forwarded_from", "forwarded_from_id"}  # in Telegram's messages
SLACK_SAID = (None, "", "thread_broadcast", "me_message", "bot_message")


def is_telegram(value: Any) -> bool:
    """One chat, or an account's list of chats."""
    return isinstance(value, dict) and (
        {"name", "type", "id", "messages"} <= value.keys()
        or (isinstance(value.get("chats"), dict) and isinstance(value["chats"].get("list"), list))
    )


def is_discord(value: Any) -> bool:
    return isinstance(value, dict) and {"guild", "channel", "messages"} <= value.keys()


def is_slack(value: Any) -> bool:
    """A day of a channel, or one message of it."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and first.get("type") == "message" and "ts" in first


def telegram(documents: Iterable[Document], reading: Reading) -> Iterator[Message]:
    """Text may be a list of plain pieces and of pieces with a mark; services and media are left out."""
    for place, value in documents:
        if not is_telegram(value):
            raise DataError(f"{place}: {shown(value)} is no export of Telegram")
        for chat in value["chats"]["list"] if "chats" in value else [value]:
            if not isinstance(chat, dict):
                raise DataError(f"{place}: found {shown(chat)} where a chat belongs")
            conversation = str(chat.get("id"))
            for where, message in _each(chat.get("messages"), f"{place}, chat {conversation}"):
                if message.get("type") != "message":
                    reading.leave_out("notice of the app", where)
                    continue
                if FORWARDED & message.keys() or message.get("via_bot"):  # null: from an account that is gone
                    reading.leave_out("message of somebody else, forwarded or of a bot", where)
                    continue
                yield Message(
                    name(message.get("from_id") or message.get("from"), where, "from"),
                    _pieces(message.get("text"), where),
                    moment(message.get("date_unixtime") or message.get("date"), where),
                    where,
                    conversation,
                    f"{conversation}:{message.get('id')}",
                    f"{conversation}:{message['reply_to_message_id']}" if message.get("reply_to_message_id") else "",
                )


def _pieces(value: object, where: str) -> str:
    pieces = value if isinstance(value, list) else [value]
    return "".join(text(p.get("text") if isinstance(p, dict) else p, where, "text") for p in pieces)


def discord(documents: Iterable[Document], reading: Reading) -> Iterator[Message]:
    """DiscordChatExporter's JSON; messages of bots and notices are left out."""
    for place, value in documents:
        if not is_discord(value) or not isinstance(value["channel"], dict):
            raise DataError(f"{place}: {shown(value)} is no export of Discord")
        conversation = str(value["channel"].get("id"))
        for where, message in _each(value.get("messages"), place):
            author, reference = (_object(message, key, where) for key in ("author", "reference"))
            if author.get("isBot"):
                reading.leave_out("message of a bot", where)
            elif message.get("type", "Default") not in ("Default", "Reply"):
                reading.leave_out("notice of the app", where)
            else:
                yield Message(
                    name(author.get("id") or author.get("name"), where, "author"),
                    text(message.get("content"), where, "content"),
                    moment(message.get("timestamp"), where),
                    where,
                    conversation,
                    str(message.get("id")),
                    str(reference.get("messageId") or ""),
                )


def _object(message: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    found = message.get(key) or {}
    if not isinstance(found, dict):
        raise DataError(f"{where}: {key} = {shown(found)} must be an object")
    return found


def slack(documents: Iterable[Document], reading: Reading, channel: str = "") -> Iterator[Message]:
    """A channel; a thread is a conversation of its own, after the message that opens it."""
    for place, value in documents:
        for where, message in _each(value if isinstance(value, list) else [value], place):
            if message.get("bot_id"):
                reading.leave_out("message of a bot", where)
            elif message.get("type") != "message" or message.get("subtype") not in SLACK_SAID:
                reading.leave_out("notice of the app", where)
            else:
                stamp, thread = str(message.get("ts")), str(message.get("thread_ts") or "")
                yield Message(
                    name(message.get("user"), where, "user"),
                    _unmarked(text(message.get("text"), where, "text")),
                    moment(message.get("ts"), where),
                    where,
                    f"{channel}:{thread}" if thread else channel,
                    f"{channel}:{stamp}",
                )


def _unmarked(written: str) -> str:
    """Links, mentions and channels as a reader sees them, and the three characters that are written as entities."""
    shown = MARK.sub(lambda mark: _shown(*mark.groups()), written)
    return shown.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def _shown(kind: str, target: str, label: str | None) -> str:
    if kind == "!":  # <!here>, <!subteam^S1|@team>, <!date^1392734382^{date}|today>
        return label or f"@{target}"
    return f"{kind}{label.removeprefix(kind)}" if label else f"{kind}{target.removeprefix('mailto:')}"


def _each(messages: object, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(messages, list):
        raise DataError(f"{place}: messages = {shown(messages)} must be a list")
    for n, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{place}, message {n}: found {shown(message)} where a message belongs")
        yield f"{place}, message {n}", message
