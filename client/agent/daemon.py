"""The agent as a process: the model warm, the socket, the page, and learning by itself when it may."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

from florilegium.client.agent.connection_limits import by_user
from florilegium.client.agent.errors import HomeError
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.http_server import Bounds, open_server
from florilegium.client.agent.memory_limits import limit_memory
from florilegium.client.lm.llamacpp import check_llamacpp
from florilegium.client.lm.places import check_model
from florilegium.privacy.common.dumps import hide_memory

if TYPE_CHECKING:
    from florilegium.client.agent.agent import Agent

log = logging.getLogger(__name__)
LOOK_S = 30.0  # between two looks at whether it is time to learn
STOP_S = 3.0  # for learning that is going on
PAGES = Bounds(
    connections=128, of_an_address=128, unauthenticated=16, unauthenticated_at_once=32, unauthenticated_a_minute=60
)
OWNERS = Bounds(connections=256, of_an_address=256)  # of the owner's own commands, which others cannot reach


@contextmanager
def listening(agent: Agent) -> Iterator[None]:
    """The agent's socket is open while this lasts; the caller holds the lock of its folder."""
    from florilegium.client.agent.http_api import application

    path = agent.device.folder.socket
    path.unlink(missing_ok=True)  # of an agent that was killed
    before = os.umask(0o177)
    try:
        listens = socket.socket(socket.AF_UNIX)
        listens.bind(str(path))
    finally:
        os.umask(before)
    with open_server(application(agent), listens, OWNERS):
        yield
    path.unlink(missing_ok=True)


@contextmanager
def showing(agent: Agent, port: int) -> Iterator[str]:
    """The page is there while this lasts; yields its address without the token that opens it. Raises `HomeError`."""
    from florilegium.client.agent.access import HEADERS
    from florilegium.client.agent.http_api import page_application

    listens = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio lets it wait
    listens.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listens.bind(("127.0.0.1", port))
    except OSError:
        listens.close()
        raise HomeError(
            f"port {port} of 127.0.0.1 is taken: florilegium device serve --port 0 takes a free one"
        ) from None
    port = listens.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    with open_server(page_application(agent, port), listens, PAGES, headers=HEADERS, kind_of=by_user):
        agent.page_address = f"{address}#token={agent.page_token}"
        yield address
    agent.page_address = ""


@contextmanager
def learning(agent: Agent, clock: Callable[[], time.struct_time] = time.localtime) -> Iterator[None]:
    """Learns by itself while this lasts, whenever it is due."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            try:
                if agent.due(clock(), plugged()):
                    agent.learn()
                agent.settle()
            except Exception as error:  # noqa: BLE001  # the agent goes on answering its owner
                log.error("learning went wrong: %s", type(error).__name__)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(STOP_S)  # what is learned meanwhile is whole or not there


def plugged() -> bool | None:
    """Whether the machine draws from the mains; None where nothing tells."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return None if battery is None else battery.power_plugged


@contextmanager
def opened(folder: DeviceFolder) -> Iterator[Agent]:
    """The agent of a folder, alone with it, its socket open."""
    with folder.locked():
        config = folder.check()
        check_model(config.device.model.name)
        if config.generation.backend == "llamacpp":
            check_llamacpp()
        limit_memory(config.memory_limit)
        hide_memory()

        from florilegium.client.agent.agent import Agent  # and with it torch, now that nothing is left to refuse

        agent = Agent.open(folder)
        try:
            agent.settle()
            with listening(agent):
                yield agent
        finally:
            agent.close()
