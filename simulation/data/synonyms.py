"""What other formats call what is called `user`, `time`, `prompt`, `response` and `domain` here.

Likeness of letters alone misleads: `completion` is nearer to "prompt" than to "response".
"""

from __future__ import annotations

from collections.abc import Iterable

from florilegium.privacy.common.suggestions import did_you_mean

CALLED: dict[str, tuple[str, ...]] = {
    "user": (
        "user_id", "userid", "username", "user_name", "author", "author_id", "speaker", "speaker_id", "sender", "from",
        "name", "person", "client", "client_id", "worker", "worker_id", "participant",
    ),
    "time": ("timestamp", "date", "datetime", "created", "created_at", "create_time", "created_utc", "sent_at", "ts"),
    "prompt": ("instruction", "question", "q", "query", "input", "request", "message", "context", "source", "src"),
    "response": ("completion", "output", "answer", "a", "answers", "reply", "target", "label", "assistant"),
    "domain": ("topic", "category", "subject", "genre", "task"),
    "text": ("message", "content", "body", "msg", "message_text"),
    "conversation": (
        "conversation_id", "conv", "conv_id", "thread", "thread_id", "channel", "channel_id", "chat", "chat_id", "room",
        "dialog_id", "dialogue_id",
    ),
    "id": ("message_id", "msg_id"),
    "reply_to": ("reply_to_id", "in_reply_to", "parent_id", "parent", "replyto", "reply_to_message_id"),
}  # fmt: skip
READ: dict[str, str] = {  # by another reader, which the first line decides
    "messages": "OpenAI's chats are read where the first line has 'messages'",
    "conversations": "ShareGPT's chats are read where the first line has 'conversations'",
    "chosen": "preferences are read where the first line has 'chosen' and 'rejected'",
    "rejected": "preferences are read where the first line has 'chosen' and 'rejected'",
}
OTHERWISE: dict[str, str] = {
    "conversation": "a format of whole chats",
    "dialog": "a format of whole chats",
    "dialogue": "a format of whole chats",
    "turns": "a format of whole chats",
    "mapping": "the export of ChatGPT",
    "content": "a format of single messages",
    "role": "a format of single messages",
    "text": "a format of plain texts",
}
ALPACA = (
    "Alpaca's instruction and input, one after the other, are called 'prompt' here, and its output 'response'; "
    "say in 'user' whose device a line is for"
)


def hint(key: str, keys: Iterable[str], row: Iterable[str]) -> str:
    """What to write in place of an unknown key of a row that has others too."""
    known, lower = tuple(keys), key.lower()
    if {"instruction", "output"} <= set(row) and lower in ("instruction", "input", "output"):
        return ALPACA
    if lower in READ:
        return f"{READ[lower]}, but no user, prompt and response beside; keep to one format in a file"
    if lower in OTHERWISE:
        return (
            f"{OTHERWISE[lower]} is not read: write a line with user, prompt and response for each reply, "
            f"the message before it as the prompt"
        )
    for ours in (ours for ours in CALLED if ours in known):
        if lower == ours or lower in CALLED[ours]:
            return f"it is called {ours!r} here"
    return did_you_mean(lower, known, 0.75) or f"leave it out; known keys: {', '.join(known)}"


def is_foreign(key: str, keys: Iterable[str]) -> bool:
    """Whether an unknown key is not one of ours under another name or misspelt, nor one that tells a format."""
    known, lower = tuple(keys), key.lower()
    synonyms = {name for ours in known for name in (ours, *CALLED.get(ours, ()))}
    return lower not in {*READ, *OTHERWISE, *synonyms} and not did_you_mean(lower, known, 0.75)


def most_telling(keys: Iterable[str]) -> str:
    """Of unknown keys the one that says which format this is; "" of none."""
    return min(keys, key=lambda key: key.lower() not in {**READ, **OTHERWISE}, default="")


def columns_for(role: str, columns: Iterable[str]) -> list[str]:
    """Which of a table's columns may hold what is called `role` here."""
    return [column for column in columns if column.lower() == role or column.lower() in CALLED[role]]
