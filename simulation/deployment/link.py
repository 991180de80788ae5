"""The messages between a server's rounds and its devices, in this process' memory.

Flower's link state and object store hold them, and Flower's own handlers put them in and take them out; its SuperLink,
which would also run whatever bundle somebody sends to its control interface, is not started. There is one run, one
process, and no other way in than `simulation.deployment.https_server`. Written for Flower 1.41 and 1.42, whose
private parts it uses.
"""

from __future__ import annotations

import io
import logging
import time
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.app import Error, Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers

log = logging.getLogger(__name__)
HANDLERS = {
    "GetNodes": runtime_handlers.get_nodes,
    "PushMessages": runtime_handlers.push_messages,
    "PullMessages": runtime_handlers.pull_messages,
    "PushObject": runtime_handlers.push_object,
    "PullObject": runtime_handlers.pull_object,
    "ConfirmMessageReceived": runtime_handlers.confirm_message_received,
}
LOOK_S = 0.5  # between two looks for answers
BUNDLE = """[project]
name = "florilegium-server"
version = "1"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "florilegium"

[tool.flwr.app.components]
serverapp = "nothing:server"
clientapp = "nothing:client"
"""


class Link:
    """Of one server: its devices by name, one run that lasts as long as the process."""

    def __init__(self) -> None:
        store = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME).store()
        self.state = InMemoryLinkState(NoOpFederationManager(), store)
        bundle = self.state.store_fab(Fab("", _bundle(), {}))
        self.run_id = self.state.create_run(
            "florilegium/florilegium-server", "1", bundle, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID,
            TaskType.SERVER_APP,
        )  # fmt: skip
        (self.run,) = self.state.get_run_info(run_ids=[self.run_id])
        self.task = Task(task_id=self.run.primary_task_id or 0, run_id=self.run_id)
        self.state.claim_task(self.task.task_id)
        self.state.activate_task(self.task.task_id)
        self.state.task_token_store.clear()  # or the run would end without a worker's heartbeats
        self.nodes: dict[str, int] = {}  # device → Flower's node id
        self.keys: dict[bytes, str] = {}  # a public key in PEM → device

    def set_admitted(self, keys: Mapping[str, bytes]) -> None:
        """These devices, by their keys in PEM, may connect, and no others any more."""
        for name in [n for n, key in ((n, k) for k, n in self.keys.items()) if keys.get(n) != key]:
            self.state.delete_node(NOOP_FLWR_AID, self.nodes.pop(name))
            self.keys = {k: n for k, n in self.keys.items() if n != name}
        for name, key in keys.items():
            if name not in self.nodes:
                self.state.node_public_key_to_node_id.pop(key, None)  # of a device that was expelled before
                self.nodes[name] = self.state.create_node(
                    NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_DEFAULT_INTERVAL, name=name
                )
                self.keys[key] = name

    def online(self) -> dict[str, int]:
        """The nodes of devices that are connected."""
        there = {node.node_id for node in self.state.get_node_info(statuses=[NodeStatus.ONLINE])}
        return {name: node for name, node in self.nodes.items() if node in there}


class LinkGrid(HttpGrid):
    """Flower's grid over a link of this process: nothing of it goes over a network."""

    def __init__(self, link: Link) -> None:
        super().__init__(token="none")
        self._link = link
        self._pulled: PullAppMessagesResponse | None = None  # an answer that is being read
        self.set_run(link.run)
        TaskIdentity.task_id, TaskIdentity.run_id = link.task.task_id, link.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    @property
    def _runtime_client(self) -> RuntimeHttpClient:
        return _Handlers(self._link, self._pulled)  # type: ignore[return-value]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """What was not answered in time is not asked any more: a device would spend on a round that is over.

        A device that is expelled meanwhile is not waited for.
        """
        pushed = list(messages)
        asked = {i: m for i, m in zip(self.push_messages(pushed), pushed, strict=False) if i}
        waiting, unanswered = set(asked), set(asked)
        until, found = time.monotonic() + (timeout or 0.0), list[Message]()
        while waiting and (timeout is None or time.monotonic() < until):
            pulled = _Handlers(self._link).PullMessages(PullAppMessagesRequest(message_ids=waiting))
            for envelope, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                i = envelope.metadata.reply_to_message_id
                unanswered.discard(i)
                alone = PullAppMessagesResponse(messages_list=[envelope], message_object_trees=[tree])
                found.append(self._reply(i, asked[i], alone))
            there = set(self._link.nodes.values())
            waiting = {i for i in unanswered if asked[i].metadata.dst_node_id in there}
            if waiting:
                time.sleep(LOOK_S)
        self._link.state.delete_messages(unanswered)
        for left in unanswered:
            self._link.state.object_store.delete(left)
        return found

    def _reply(self, identity: str, asked: Message, pulled: PullAppMessagesResponse) -> Message:
        """The answer to one message, out of what was pulled: of the device that was asked, whatever stands in it.

        What cannot be read, or says that it is another device's, is an error of the device's own: whoever was admitted
        can send any bytes under a name of Flower's objects.
        """
        node, self._pulled = asked.metadata.dst_node_id, pulled
        try:
            (reply,) = self.pull_messages([identity])
            if (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == (node, identity):
                return reply
        except Exception as error:  # noqa: BLE001  # DecodeError, JSONDecodeError, AttributeError, … of Flower's parsing
            log.warning("an answer cannot be read: %s", type(error).__name__)
        reply = Message(Error(0), reply_to=asked)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply


class _Handlers:
    """What a client of Flower's runtime would ask over HTTP."""

    def __init__(self, link: Link, pulled: PullAppMessagesResponse | None = None) -> None:
        """With `pulled` that is what there is to pull."""
        self.link, self.pulled = link, pulled

    def __getattr__(self, name: str) -> Any:
        if name == "PullMessages" and self.pulled:
            return lambda request: self.pulled
        handler = HANDLERS[name]
        return lambda request: handler(request, self.link.state, self.link.task)


def pem_of(public_key: str) -> bytes:
    """A device's public key, from OpenSSH's form, as Flower's messages name it. Raises ValueError."""
    try:
        key = load_ssh_public_key(public_key.strip().encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _bundle() -> bytes:
    """Flower hands a run's bundle to each device; ours run nothing of it, and there is nothing in it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("pyproject.toml", BUNDLE)
    return packed.getvalue()
