"""A Flower Grid that hands whole cohorts to the processes of a fleet.

Strategy and ServerApp cannot tell it from Flower's own: messages go in, replies come out, each as soon as its cohort
is done. What is saved is the message store, the polling and the pickling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any
from uuid import uuid4

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # private: a message cannot be made outside a run without it

from florilegium.client.devices import Devices
from florilegium.client.flower_replies import (
    DeviceReply,
    Instruction,
    contributions,
    greeting,
    masked,
    open_parts,
    read_question,
    refusal,
    replies,
    step_reply,
)
from florilegium.client.secure_sessions import Sessions
from florilegium.privacy.release import Schema
from florilegium.privacy.reply_gate import NO_RELEASE
from florilegium.privacy.secure_aggregation.part import SumPart
from florilegium.privacy.secure_aggregation.session import Session
from florilegium.privacy.secure_aggregation.wire import STEPS
from florilegium.simulation.engines.workers import Done, Job

GREETED_AT_ONCE = 1024  # messages; a whole population's would fill the memory
Spread = Callable[[Job, Sequence[str], Any], Iterator[Done]]  # over cohorts and processes


class CohortGrid(Grid):
    """Nodes 1 … n are the devices `names[0]` … `names[n − 1]`; `spread` does their work.

    Their `sessions` of secure aggregation, keys and masks, are in this process.
    """

    def __init__(self, spread: Spread, schema: Schema, names: Sequence[str], sessions: Sessions | None = None) -> None:
        self.spread, self.schema, self.names, self.sessions = spread, schema, names, sessions
        self.replies: dict[str, Message] = {}
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("a cohort grid belongs to no run of a SuperLink")

    @property
    def run(self) -> Run:
        raise NotImplementedError("a cohort grid belongs to no run of a SuperLink")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return range(1, len(self.names) + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        answers = list(self.send_and_receive(messages))
        ids = [str(uuid4()) for _ in answers]
        self.replies.update(zip(ids, answers, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Messages of one type; the replies come in any order."""
        left = iter(messages)
        while some := list(islice(left, GREETED_AT_ONCE)):
            if some[0].metadata.message_type == MessageType.QUERY:
                yield from (greeting(self._name(m)).to(m) for m in some)
            elif self.sessions and some[0].metadata.message_type in STEPS:
                yield from self._step([*some, *left], self.sessions)
            else:
                yield from self._asked([*some, *left])

    def _name(self, message: Message) -> str:
        return self.names[message.metadata.dst_node_id - 1]

    def _asked(self, messages: Sequence[Message]) -> Iterator[Message]:
        if not messages:
            return
        by_name = {self._name(m): m for m in messages}
        question = read_question(messages, list(by_name), self.schema)
        if self.sessions and question.kind == MessageType.TRAIN:
            yield from self._summed(by_name, question, self.sessions)
            return
        asked = released if question.kind == MessageType.TRAIN else adopted
        for _, answers in self.spread(asked, list(by_name), question):
            yield from (self._reply(given, question).to(by_name[name]) for name, given in answers)

    def _reply(self, given: DeviceReply | SumPart, question: Instruction) -> DeviceReply:
        """A part of a sum has none where there are no masks."""
        return refusal(NO_RELEASE) if isinstance(given, SumPart) else given

    def _step(self, messages: Sequence[Message], sessions: Sessions) -> Iterator[Message]:
        """What devices say at a step of secure aggregation, which costs them nothing but keys."""
        return (step_reply(m, self._name(m), sessions).to(m) for m in messages)

    def _summed(self, by_name: Mapping[str, Message], question: Instruction, sessions: Sessions) -> Iterator[Message]:
        """What devices give to a sum, masked here."""
        opened = open_parts(list(by_name.values()), list(by_name), question.plan, sessions)
        able = {name: found for name, found in opened.items() if isinstance(found, Session)}
        yield from (found.to(by_name[name]) for name, found in opened.items() if isinstance(found, DeviceReply))
        for _, answers in self.spread(released, list(able), question) if able else ():
            yield from (masked(able[name], given, sessions).to(by_name[name]) for name, given in answers)


def released(devices: Devices, names: Sequence[str], question: Instruction) -> list[tuple[str, DeviceReply | SumPart]]:
    """The replies of a cohort that is asked for releases, or its parts of a sum."""
    return list(zip(names, contributions(question, names, devices), strict=True))


def adopted(devices: Devices, names: Sequence[str], question: Instruction) -> list[tuple[str, DeviceReply]]:
    """The replies of a cohort that is given what its releases became."""
    return list(zip(names, replies(question, names, devices), strict=True))
