"""A Flower Grid that hands whole cohorts to the client code in this process.

Strategy and ServerApp cannot tell it from Flower's own: messages go in, replies come out. What is saved is the
message store, the polling and the pickling. Not covered: several processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from uuid import uuid4

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # private: a message cannot be made outside a run without it

from client.app import Devices, answer


class CohortGrid(Grid):
    """Nodes 1 … n are the devices `names[0]` … `names[n − 1]`."""

    def __init__(self, devices: Devices, names: Sequence[str]) -> None:
        self.devices, self.names = devices, list(names)
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
        replies = self._answers(list(messages))
        ids = [str(uuid4()) for _ in replies]
        self.replies.update(zip(ids, replies, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._answers(list(messages))

    def _answers(self, messages: list[Message]) -> list[Message]:
        """One call of the client code for all messages of one type."""
        if not messages:
            return []
        names = [self.names[m.metadata.dst_node_id - 1] for m in messages]
        return answer(messages, names, self.devices)
