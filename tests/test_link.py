"""Answers on their way to a server's rounds: whatever bytes an admitted device sends, the rounds go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as Envelope
from flwr.proto.message_pb2 import Metadata as Told
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import RecordDict as Content
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from florilegium.simulation.deployment.https_server import HANDLERS
from florilegium.simulation.deployment.link import Link, LinkGrid


def key() -> bytes:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def linked() -> tuple[Link, int, int]:
    link = Link()
    link.set_admitted({"a": key(), "b": key()})
    for node in link.nodes.values():
        link.state.activate_node(node, 600.0)
    return link, link.nodes["a"], link.nodes["b"]


Made = tuple[dict[str, bytes], ObjectTree]  # objects by their hashes, and the tree of them


def pushed(link: Link, node: int, made: Callable[[Any], Made]) -> None:
    """A device's answer to what it was asked, whatever is made of it, with an envelope as it should be."""
    until = time.monotonic() + 10
    while not (found := link.state.get_message_ins(node_id=node, limit=None, run_id=link.run_id)):
        assert time.monotonic() < until
        time.sleep(0.05)
    asked = found[0].metadata
    objects, tree = made(asked)
    told = Told(
        message_id=tree.object_id, run_id=link.run_id, src_node_id=node, dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id, message_type=asked.message_type, ttl=asked.ttl,
        created_at=asked.created_at,
    )  # fmt: skip
    envelope = PushMessagesRequest(
        node=Node(node_id=node), messages_list=[Envelope(metadata=told, content=Content())], message_object_trees=[tree]
    )
    session = HANDLERS["push-messages"](envelope, link).session_id
    for identity, content in objects.items():
        request = PushObjectRequest(
            node=Node(node_id=node), run_id=link.run_id, session_id=session, object_id=identity, object_content=content
        )
        HANDLERS["push-object"](request, link)


def asked(link: Link, answer: threading.Thread, *nodes: int) -> list[Message]:
    grid = LinkGrid(link)
    messages = [
        Message(RecordDict({"plan": ConfigRecord({"round": 1, "of": n})}), dst_node_id=n, message_type="query.keys")
        for n in nodes
    ]
    answer.start()
    found = list(grid.send_and_receive(messages, timeout=5))
    answer.join()
    return found


@pytest.mark.parametrize(
    ("kind", "body"), [("Message", b"\xff\xff"), ("ConfigRecord", b""), ("Array", b"zz"), ("RecordDict", b"")]
)
def test_bytes_that_are_no_answer_are_an_error_of_the_device_that_sent_them(kind: str, body: bytes) -> None:
    link, node, _ = linked()

    def made(question: Any) -> Made:
        content = f"{kind}  {len(body)}".encode() + b"\x00" + body
        identity = sha256(content).hexdigest()
        return {identity: content}, ObjectTree(object_id=identity)

    (reply,) = asked(link, threading.Thread(target=pushed, args=(link, node, made), daemon=True), node)
    assert reply.has_error() and reply.metadata.src_node_id == node


@pytest.mark.parametrize("anothers", [False, True])
def test_an_answer_is_that_of_the_device_that_was_asked(anothers: bool) -> None:
    """The envelope is checked at the door; what is in it may name somebody else."""
    link, node, other = linked()

    def made(question: Any) -> Made:
        inner = make_message(
            metadata=Metadata(
                run_id=link.run_id, message_id="", src_node_id=other if anothers else node,
                dst_node_id=question.src_node_id, reply_to_message_id=question.message_id, group_id="",
                created_at=question.created_at, ttl=question.ttl, message_type=question.message_type,
            ),
            content=RecordDict({"header": ConfigRecord({"error": "failed"})}),
        )  # fmt: skip
        return {i: o.deflate() for i, o in get_all_nested_objects(inner).items()}, get_object_tree(inner)

    (reply,) = asked(link, threading.Thread(target=pushed, args=(link, node, made), daemon=True), node)
    assert reply.metadata.src_node_id == node and reply.has_error() == anothers
