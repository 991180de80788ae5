"""The device's side of Flower's messages: what a server may ask, and what it gets back.

A failure is answered with a code, never with an exception's text, which could quote a dialogue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from florilegium.client.devices import Devices
from florilegium.client.flower_arrays import to_record
from florilegium.client.secure_sessions import Sessions, answer_step, open_part
from florilegium.privacy.encoding import ENCODINGS, Encoded
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import PROTOCOL, WEIGHT, Release, ReleaseRefusedError, Schema
from florilegium.privacy.release import Array as Numbers
from florilegium.privacy.reply_gate import (
    BAD_MESSAGE,
    NO_RELEASE,
    check_masked_reply,
    check_reply,
    check_step,
    is_count,
)
from florilegium.privacy.secure_aggregation import wire
from florilegium.privacy.secure_aggregation.neighbours import RoundRefusedError
from florilegium.privacy.secure_aggregation.part import SumPart
from florilegium.privacy.secure_aggregation.rounded_noise import SumCode
from florilegium.privacy.secure_aggregation.session import Numbers as MaskedNumbers
from florilegium.privacy.secure_aggregation.session import Session

NO_ARRAYS = Schema(())
PLAN = {"round", "version", "head"}  # what a server may say beside the shared adapter
ONLY_A_PLAN = f"a plan has {', '.join(sorted(PLAN))} and nothing else: all other settings are the device's"


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a server wants of several devices: a kind of message, a plan and the shared adapter (P,)."""

    kind: str
    plan: RoundPlan
    received: torch.Tensor


@dataclass(frozen=True)
class DeviceReply:
    """What one device says to the server. Made by `_reply` alone, so that the gate has passed it."""

    header: Mapping[str, str | int | bytes | list[str] | list[bytes]]
    arrays: Encoded | None = None

    def to(self, message: Message) -> Message:
        """With the question's own times: an envelope must not tell when the work was done."""
        reply, asked = Message(self.content, reply_to=message), message.metadata
        reply.metadata.created_at, reply.metadata.ttl = asked.created_at, asked.ttl
        return reply

    @cached_property
    def content(self) -> RecordDict:
        content = RecordDict({"header": ConfigRecord(dict(self.header))})
        if self.arrays is not None:
            content["arrays"] = to_record(self.arrays)
        return content


def answer(messages: Sequence[Message], names: Sequence[str], devices: Devices) -> list[Message]:
    """Replies to messages of one type to the devices `names`, in their order."""
    sessions = devices.sessions
    if sessions and messages[0].metadata.message_type in wire.STEPS:
        return [step_reply(m, name, sessions).to(m) for m, name in zip(messages, names, strict=True)]
    try:
        question = read_question(messages, names, devices.schema)
    except (KeyError, ValueError, ReleaseRefusedError):
        return [refusal(BAD_MESSAGE).to(m) for m in messages]
    if sessions and question.kind == MessageType.TRAIN:
        return [reply.to(m) for m, reply in zip(messages, _summed(messages, names, question, devices), strict=True)]
    return [reply.to(m) for m, reply in zip(messages, replies(question, names, devices), strict=True)]


def replies(question: Instruction, names: Sequence[str], devices: Devices) -> list[DeviceReply]:
    """Of each device, in their order."""
    plan = question.plan
    if question.kind == MessageType.QUERY:
        return [greeting(name) for name in names]
    if question.kind == MessageType.EVALUATE:
        devices.adopt(names, question.received, plan)
        return [_reply({"adopted": plan.version})] * len(names)
    return [
        refusal(NO_RELEASE) if isinstance(found, SumPart) else found  # a part of a sum leaves behind masks alone
        for found in contributions(question, names, devices)
    ]


def contributions(question: Instruction, names: Sequence[str], devices: Devices) -> list[DeviceReply | SumPart]:
    """What each device gives: the reply with its release, or its part of a sum, to be masked."""
    found = devices.contribute(names, question.received, question.plan)
    return [r if isinstance(r, SumPart) else _release_reply(r, question.plan, devices.schema) for r in found]


# -- secure aggregation ----------------------------------------------------------------------------------------------


def step_reply(message: Message, name: str, sessions: Sessions) -> DeviceReply:
    """What a device says at a step of secure aggregation that is not about its numbers."""
    try:
        number, told = read_step(message)
        said = answer_step(message.metadata.message_type, told, name, number, sessions)
    except RoundRefusedError as error:
        return refusal(str(error))
    except (KeyError, ValueError):
        return refusal(BAD_MESSAGE)
    check_step(said)
    return DeviceReply(said)


def read_step(message: Message) -> tuple[int, wire.Record]:
    """The round that a step is of, and what is told there. Raises KeyError or ValueError for anything else in it."""
    content = message.content.config_records
    if set(content["plan"]) != PLAN:
        raise ValueError(ONLY_A_PLAN)
    return _count(content["plan"]["round"]), dict(content[wire.RECORD])


def open_parts(
    messages: Sequence[Message], names: Sequence[str], plan: RoundPlan, sessions: Sessions
) -> dict[str, Session | DeviceReply]:
    """The session of each device that is asked for its numbers, before it learns anything; or why it does not."""
    found = dict[str, Session | DeviceReply]()
    for message, name in zip(messages, names, strict=True):
        try:
            found[name] = open_part(dict(message.content.config_records[wire.RECORD]), name, plan, sessions)
        except RoundRefusedError as error:
            found[name] = refusal(str(error))
        except (KeyError, ValueError):
            found[name] = refusal(BAD_MESSAGE)
    return found


def _summed(
    messages: Sequence[Message], names: Sequence[str], question: Instruction, devices: Devices
) -> list[DeviceReply]:
    """Of each device its part of a sum, masked by itself."""
    assert devices.sessions
    opened = open_parts(messages, names, question.plan, devices.sessions)
    able = [name for name, found in opened.items() if isinstance(found, Session)]
    given = dict(zip(able, contributions(question, able, devices) if able else [], strict=True))
    return [
        masked(found, given[name], devices.sessions) if isinstance(found, Session) else found
        for name, found in opened.items()
    ]


def masked(session: Session, given: DeviceReply | SumPart, sessions: Sessions) -> DeviceReply:
    """The reply with a device's part of a sum behind its masks; or the one that says why there is none."""
    if isinstance(given, DeviceReply):
        return given
    code = sessions.code(session.scene.round)
    try:
        numbers = session.masked(given.numbers, code.bits)
    except RoundRefusedError as error:
        return refusal(str(error))
    sessions.keep(session)
    return part_reply(given, numbers, code)


def part_reply(part: SumPart, numbers: MaskedNumbers, code: SumCode) -> DeviceReply:
    """The reply with the numbers (P,) of a part, as they are to be sent."""
    header: dict[str, str | int] = {"protocol": PROTOCOL, "version": part.version, "head": part.head}
    arrays = wire.masked_array(numbers, code.bits)
    check_masked_reply(header, arrays, code.size_bytes)
    return DeviceReply(header, arrays)


def read_question(messages: Sequence[Message], names: Sequence[str], schema: Schema) -> Instruction:
    """What messages of one type ask; they differ in the ledgers' heads alone.

    Raises KeyError, ValueError or `ReleaseRefusedError` for what does not fit the devices' schema.
    """
    kind, content = messages[0].metadata.message_type, messages[0].content
    if kind == MessageType.QUERY:
        return question(kind, [], {}, names, schema)
    arrays = {name: array.numpy() for name, array in content.array_records["arrays"].items()}
    return question(kind, [m.content["plan"] for m in messages], arrays, names, schema)


def question(
    kind: str,
    plans: Sequence[Mapping[str, object]],
    arrays: Mapping[str, Numbers],
    names: Sequence[str],
    schema: Schema,
) -> Instruction:
    """What was asked, of a plan for each of the devices `names` and the arrays of a shared adapter.

    Raises KeyError, ValueError or `ReleaseRefusedError` for what does not fit the devices' schema.
    """
    if kind not in (MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE):
        raise ValueError("not a kind of message that a device answers")
    if kind == MessageType.QUERY:
        return Instruction(kind, RoundPlan(0, 0), torch.empty(0))
    if any(set(plan) != PLAN for plan in plans):
        raise ValueError(ONLY_A_PLAN)
    heads = {name: str(plan["head"]) for name, plan in zip(names, plans, strict=True)}
    plan = RoundPlan(_count(plans[0]["round"]), _count(plans[0]["version"]), heads)
    down = schema.with_weights() if any(name.endswith(WEIGHT) for name in arrays) else schema
    return Instruction(kind, plan, torch.from_numpy(down.join(arrays)))


def _count(value: object) -> int:
    """Raises `ValueError` for what is not a number that a reply could repeat."""
    number = int(str(value))
    if not is_count(number):
        raise ValueError(f"{number} is not a number of a round")
    return number


def _release_reply(release: Release | None, plan: RoundPlan, schema: Schema) -> DeviceReply:
    if release is None:
        return refusal(NO_RELEASE)
    header: dict[str, str | int] = {"protocol": release.protocol, "version": release.version, "head": release.head}
    sent = schema.of_round(plan.round, schema.rank_of(release.arrays, plan.round))
    return _reply(header, ENCODINGS[schema.encoding].encode(release.arrays), sent)


def greeting(name: str) -> DeviceReply:
    """Which device this is."""
    return _reply({"device": name})


def refusal(code: str) -> DeviceReply:
    """An answer that says only that there is none, and why, in a word."""
    return _reply({"error": code})


def _reply(header: Mapping[str, str | int], arrays: Encoded | None = None, schema: Schema = NO_ARRAYS) -> DeviceReply:
    """The one place where an answer to a server is made."""
    check_reply(header, arrays, schema)
    return DeviceReply(header, arrays)
