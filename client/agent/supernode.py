"""Carries a server's messages to the agent and its answers back, beside Flower's own SuperNode.

The SuperNode (`client.agent.supernode_process`, a process of its own) holds the connection (TLS, the node's key) and
offers each message as a task. Stock Flower would then start a process, install the bundle that the server sent and
run its code. Here nothing of the bundle is unpacked or run, whatever is in it: the agent, which has the model in its
memory, answers by its owner's settings. What goes wrong is answered with a code. Written for Flower 1.41 and 1.42,
whose private parts it uses.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509 import BasicConstraints, ExtensionNotFound, load_pem_x509_certificates
from flwr.app import Message, MessageType
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

import florilegium
from florilegium.client.agent.agent import Agent
from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.folder import write_private
from florilegium.client.agent.pace import doubled
from florilegium.client.agent.signature import is_sealed
from florilegium.client.flower_arrays import on_a_wire
from florilegium.client.flower_replies import answer, refusal
from florilegium.privacy.reply_gate import BAD_MESSAGE, FAILED, NO_DEVICE

log = logging.getLogger(__name__)
ROOM = 65_536  # bytes of a message beside its numbers
LOOK_S = 0.5  # between two looks for a task
PATIENCE_S = 10.0  # with a SuperNode that is to end
LOOPBACK = "127.0.0.1"
AGAIN_S = 10.0  # before a SuperNode that ended is started again: its server holds a dead one's place for a minute
CERTIFICATES, KEY, PUBLIC_KEY = "server-ca.pem", "node.key", "node.pub"  # in the folder for them
REASONS = {
    "Failed to activate": "the server does not know this device's key: its operator needs courier/node.pub of its home",
    "CERTIFICATE_VERIFY_FAILED": "the server is not the one whose certificate was given to join",
}
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: after a fork nothing is
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


def answered(message: Message, agent: Agent, wait: Callable[[float], object] = time.sleep) -> Message:
    """The agent's answer, at the pace of its answers; a code where there is none.

    No exception leaves: its text would go to the server.
    """
    began = time.monotonic()
    try:
        if why := _objection(message, agent):
            log.warning("%s", why)
            return refusal(BAD_MESSAGE).to(message)
        pace = agent.pace()
        reply = _answered(message, agent)
        if pace and message.metadata.message_type == MessageType.TRAIN:
            due = doubled(pace, time.monotonic() - began)
            wait(max(0.0, began + due - time.monotonic()))
        # Its owner may have ended it meanwhile.
        return reply if agent.device.federating else refusal(NO_DEVICE).to(message)
    except Exception as error:  # noqa: BLE001  # its text would go to the server
        log.error("a server's message could not be answered: %s", type(error).__name__)
        return refusal(FAILED).to(message)


def _answered(message: Message, agent: Agent) -> Message:
    try:
        found = answer([message], [agent.device.config.name], agent)[0] if agent.device.federating else None
    except Exception as error:  # noqa: BLE001  # its text would go to the server
        log.error("a server's message could not be answered: %s", type(error).__name__)
        return refusal(FAILED).to(message)
    return refusal(NO_DEVICE).to(message) if found is None else found


def _objection(message: Message, agent: Agent) -> str:
    """Why a message is not even looked at; empty where it is."""
    arrays = [a for record in message.content.array_records.values() for a in record.values()]
    if sum(len(array.data) for array in arrays) > largest_question(agent):
        return "a server's message was too large"
    federation = agent.device.membership
    if federation is not None and not is_sealed(message, federation.name, federation.operator):
        agent.turn_away("a question that its operator did not sign")
        return f"a question was not signed by the operator of {federation.name}"
    return ""


def largest_question(agent: Agent) -> int:
    """Bytes of the most that can be meant: a shared adapter and changes of the weights beside it."""
    context = agent.device.context
    weights = sum(4 * layer.in_features * layer.out_features for layer in context.shared_layout.layers)
    return context.whole.size_bytes + weights + ROOM


@contextmanager
def connected(agent: Agent) -> Iterator[None]:
    """In touch with the server that the device has joined, whenever it has and may, while this lasts."""
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), LOOPBACK]))
    over = threading.Event()
    thread = threading.Thread(target=_keep_in_touch, args=(agent, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE_S)
        if thread.is_alive():  # a round is being worked on: it is not sent any more
            _end_orphans(agent.device.folder.supernode)


def _keep_in_touch(agent: Agent, over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        try:
            federation = agent.device.membership
            if federation is None or not agent.device.federating:
                continue
            with _supernode(federation.server, agent.device.folder.supernode) as node:
                _carry(node, agent, over)
            if agent.device.federating and not over.is_set():  # it ended by itself
                log.warning("the SuperNode ended: %s; the next try is in %d s", node.reason, AGAIN_S)
                over.wait(AGAIN_S)
        except Exception as error:  # noqa: BLE001  # the device goes on without its server, and tries again
            log.error("no touch with the server: %s; the next try is in %d s", type(error).__name__, AGAIN_S)
            over.wait(AGAIN_S)


@dataclass(frozen=True)
class SuperNode:
    """Flower's process, which holds the connection, and how its tasks are asked for."""

    process: subprocess.Popen[bytes]
    port: int
    secret: bytes
    log: Path

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def listens(self) -> bool:
        """Whether it is this process that listens there, and not somebody else's."""
        try:
            found = psutil.Process(self.process.pid).net_connections("tcp")
        except psutil.Error:
            return False
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == self.port for c in found)

    @property
    def reason(self) -> str:
        """Why it ended: in brackets on a line of Flower's log; with the way out where that is known."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.startswith("[")]
        known = (text for sign, text in REASONS.items() if told and sign in told[-1])
        return next(known, told[-1] if told else f"see {self.log}")


@contextmanager
def _supernode(server: str, folder: Path) -> Iterator[SuperNode]:
    """Runs while this lasts, unless it ends by itself."""
    _end_orphans(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret, port = folder / "secret", _free_port()
    secret.unlink(missing_ok=True)
    write_private(secret, os.urandom(32).hex().encode())
    command = [
        sys.executable, "-P", "-m", "florilegium.client.agent.supernode_process", "--superlink", server,
        "--root-certificates", str(folder / CERTIFICATES), "--auth-supernode-private-key", str(folder / KEY),
        "--isolation", "process", "--superexec-auth-secret-file", str(secret), "--host", LOOPBACK, "--port", str(port),
    ]  # fmt: skip
    with open(folder / "supernode.log", "wb") as written:
        process = subprocess.Popen(
            command, env=flower_environment(folder / "flower"), stdout=written, stderr=written, preexec_fn=_end_with_us
        )
    try:
        yield SuperNode(process, port, secret.read_bytes(), folder / "supernode.log")
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def flower_environment(home: Path) -> dict[str, str]:
    """For a process of Flower's with its files in `home`: it tells nobody, looks for no update, installs nothing."""
    return {
        **os.environ,
        "PYTHONPATH": str(Path(florilegium.__file__).parent.parent),
        "FLWR_HOME": str(home.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def _end_with_us() -> None:
    """In the new process, of Linux: it is told to end when the agent does, however that comes about."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_orphans(folder: Path) -> None:
    """Of an agent that was killed, where the system does not end them: a server lets no other node in with its key."""
    for process in psutil.process_iter(["cmdline"]):
        if str(folder / KEY) in (process.info["cmdline"] or ()):
            with suppress(psutil.Error):
                process.terminate()
                process.wait(PATIENCE_S)


def _carry(node: SuperNode, agent: Agent, over: threading.Event) -> None:
    """Every task of the SuperNode, until it ends, or its owner's will to take part does."""
    while not node.listens:
        if node.process.poll() is not None or over.wait(LOOK_S):
            return
    log.info("a SuperNode is up, to reach the server")
    acquirer = _client(
        node.address,
        RuntimeVersionHttpInterceptor(component_name="SuperExec"),
        SuperExecAuthHttpInterceptor(master_secret=node.secret, protected_methods=frozenset({_ACQUIRE})),
    )
    while node.process.poll() is None and agent.device.federating and not over.is_set():
        try:
            got = acquirer.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except Exception:  # noqa: BLE001  # it is starting, or ending
            over.wait(LOOK_S)
            continue
        if not got.HasField("task") or not got.token:
            over.wait(LOOK_S)
            continue
        client = _client(
            node.address,
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(got.token),
        )
        beat = HeartbeatSender(lambda: _beats(client))  # noqa: B023
        beat.start()
        try:
            _carry_one(client, agent, over)
        except Exception as error:  # noqa: BLE001  # the next one may be
            log.error("a message was not carried: %s", type(error).__name__)
        finally:
            beat.stop()
            client.close()


def _beats(client: RuntimeHttpClient) -> bool:
    """Tells that a task is being worked on. Flower's own function ends this process where it is not wanted any more."""
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPError:
        return False
    return True


def _carry_one(client: RuntimeHttpClient, agent: Agent, over: threading.Event) -> None:
    message, context, _, _ = pull_task_input(client)  # the bundle, the last of them, is let go
    reply = on_a_wire(answered(message, agent, over.wait))
    if over.is_set():  # before its time: it is sent when it is asked for again
        return
    push_message(client, reply, context)
    push_task_output(client=client, context=context, sub_status=SubStatus.COMPLETED, details="")
    log.info("a message of the server's was answered (%s)", message.metadata.message_type)


def _client(address: str, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
    """Without a retry invoker: on a refusal it would end this process."""
    return RuntimeHttpClient.from_server_address(
        server_address=address, insecure=True, root_certificates=None, interceptors=list(interceptors)
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return int(found.getsockname()[1])


def prepare(folder: Path, certificates: Path | bytes) -> Path:
    """Keeps the server's certificates and makes this node a key, if it has none; returns the public key's file.

    Raises `DeviceError` for certificates that are not any.
    """
    told = "what was given" if isinstance(certificates, bytes) else str(certificates)
    try:
        given = certificates if isinstance(certificates, bytes) else certificates.read_bytes()
        authorities = [
            c.extensions.get_extension_for_class(BasicConstraints) for c in load_pem_x509_certificates(given)
        ]
    except FileNotFoundError:
        raise DeviceError(f"there is no file {told}") from None
    except (OSError, ValueError, ExtensionNotFound):
        authorities = []
    if not authorities or not all(a.value.ca for a in authorities):
        raise DeviceError(f"{told} holds no CA's certificate; the server's operator has one: ca.pem") from None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / CERTIFICATES).write_bytes(given)
    if not (folder / KEY).exists():
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        write_private(folder / KEY, private)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (folder / PUBLIC_KEY).write_bytes(public + b"\n")
    return folder / PUBLIC_KEY
