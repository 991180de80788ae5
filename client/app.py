"""The device's side of Flower's messages: what a server may ask, and what it gets back.

A failure is answered with a code, never with an exception's text, which could quote a dialogue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from privacy.gate import BAD_MESSAGE, NO_RELEASE, check_reply, is_count
from privacy.plan import RoundPlan
from privacy.release import Array as Numbers
from privacy.release import Release, ReleaseRefusedError, Schema

NO_ARRAYS = Schema(())


class Devices(Protocol):
    """One device or a cohort, by their names."""

    @property
    def schema(self) -> Schema: ...

    def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Release | None]: ...

    def adopt(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> None: ...


def answer(messages: Sequence[Message], names: Sequence[str], devices: Devices) -> list[Message]:
    """Replies to messages of one type to the devices `names`, in their order."""
    kind = messages[0].metadata.message_type
    if kind == MessageType.QUERY:
        return [_reply(m, {"device": name}) for m, name in zip(messages, names, strict=True)]
    try:
        plan, received = read_plan(messages, names, devices.schema)
    except (KeyError, ValueError, ReleaseRefusedError):
        return [refusal(m, BAD_MESSAGE) for m in messages]
    if kind == MessageType.EVALUATE:
        devices.adopt(names, received, plan)
        return [_reply(m, {"adopted": plan.version}) for m in messages]
    releases = devices.contribute(names, received, plan)
    return [_release_reply(m, r, devices.schema.of_round(plan.round)) for m, r in zip(messages, releases, strict=True)]


def read_plan(messages: Sequence[Message], names: Sequence[str], schema: Schema) -> tuple[RoundPlan, torch.Tensor]:
    """The plan and the shared adapter (P,) of a server's messages, which differ in the ledgers' heads alone.

    Refuses what does not fit the devices' schema.
    """
    plans = [m.content.config_records["plan"] for m in messages]
    heads = {name: str(plan["head"]) for name, plan in zip(names, plans, strict=True)}
    plan = RoundPlan(_count(plans[0]["round"]), _count(plans[0]["version"]), heads)
    arrays = {name: array.numpy() for name, array in messages[0].content.array_records["arrays"].items()}
    return plan, torch.from_numpy(schema.join(arrays))


def _count(value: object) -> int:
    """Raises `ValueError` for what is not a number that a reply could repeat."""
    number = int(str(value))
    if not is_count(number):
        raise ValueError(f"{number} is not a number of a round")
    return number


def _release_reply(message: Message, release: Release | None, schema: Schema) -> Message:
    if release is None:
        return refusal(message, NO_RELEASE)
    header: dict[str, str | int] = {"protocol": release.protocol, "version": release.version, "head": release.head}
    return _reply(message, header, release.arrays, schema)


def refusal(message: Message, code: str) -> Message:
    """An answer that says only that there is none, and why, in a word."""
    return _reply(message, {"error": code})


def _reply(
    message: Message,
    header: Mapping[str, str | int],
    arrays: Mapping[str, Numbers] | None = None,
    schema: Schema = NO_ARRAYS,
) -> Message:
    """The one place where a message to the server is made."""
    check_reply(header, arrays, schema)
    content = RecordDict({"header": ConfigRecord(dict(header))})
    if arrays is not None:
        content["arrays"] = ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in arrays.items()})
    return Message(content, reply_to=message)
