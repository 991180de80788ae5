"""Every byte that devices send: the messages of real rounds as they go onto a wire, and what each part of them is."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message
from flwr.common.serde import message_to_proto  # private: how Flower puts a message onto a wire

from florilegium.simulation.engines.in_memory import Federated


@dataclass(frozen=True)
class Sent:
    """A kind of message from a device to a server, with the largest one's bytes."""

    answers: str  # what the server asked
    header: str  # names and values of one such message
    messages: int
    arrays: int
    array_bytes: int
    wire_bytes: int  # all of it, Flower's own envelope included


def inventory(seen: Federated) -> list[Sent]:
    """The kinds of messages that devices sent."""
    kinds: dict[tuple[str, ...], list[Message]] = {}
    for message in seen.sent:
        key = (message.metadata.message_type, *sorted(message.content.config_records["header"]))
        kinds.setdefault(key, []).append(message)
    return [_described(kind[0], messages) for kind, messages in kinds.items()]


def wire(message: Message) -> bytes:
    """As it is sent."""
    written: bytes = message_to_proto(message).SerializeToString()
    return written


def _described(answers: str, messages: list[Message]) -> Sent:
    first = messages[0].content
    arrays = {k: a for record in first.array_records.values() for k, a in record.items()}
    return Sent(
        answers,
        ", ".join(f"{name} = {_told(value)}" for name, value in first.config_records["header"].items()),
        len(messages),
        len(arrays),
        sum(a.numpy().nbytes for a in arrays.values()),
        max(len(wire(m)) for m in messages),
    )


def _told(value: object) -> str:
    """A value of a header; of keys and parts how many bytes."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, list):
        return f"{len(value)} of {_told(value[0])}" if value else "none"
    return str(value)
