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
import uvicorn
from starlette.types import ASGIApp

from client.agent.board import limit_memory
from client.agent.home import Home, HomeError
from client.lm.places import check_model

if TYPE_CHECKING:
    from client.agent.agent import Agent

log = logging.getLogger(__name__)
LOOK_S = 30.0  # between two looks at whether it is time to learn
READY_S = 30.0


@contextmanager
def listening(agent: Agent) -> Iterator[None]:
    """The agent's socket is open while this lasts; the caller holds the lock of its home."""
    from client.agent.service import application

    path = agent.home.socket
    path.unlink(missing_ok=True)  # of an agent that was killed
    before = os.umask(0o177)
    try:
        opened = socket.socket(socket.AF_UNIX)
        opened.bind(str(path))
    finally:
        os.umask(before)
    with _served(application(agent), opened):
        yield
    path.unlink(missing_ok=True)


@contextmanager
def showing(agent: Agent, port: int) -> Iterator[str]:
    """The page is there while this lasts; yields its address without the token that opens it. Raises `HomeError`."""
    from client.agent.service import page_application

    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(("127.0.0.1", port))
    except OSError:
        raise HomeError(
            f"port {port} of 127.0.0.1 is taken: florilegium device serve --port 0 takes a free one"
        ) from None
    address = f"http://127.0.0.1:{opened.getsockname()[1]}/"
    with _served(page_application(agent), opened):
        agent.page_address = f"{address}?token={agent.page_token}"
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
            except Exception as error:
                log.error("learning went wrong: %s", type(error).__name__)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join()


def plugged() -> bool | None:
    """Whether the machine draws from the mains; None where nothing tells."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return None if battery is None else battery.power_plugged


@contextmanager
def _served(app: ASGIApp, opened: socket.socket) -> Iterator[None]:
    config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off", server_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
    thread.start()
    until = time.monotonic() + READY_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > until:
            raise HomeError("the agent could not open its door")
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
        opened.close()


@contextmanager
def opened(home: Home) -> Iterator[Agent]:
    """The agent of a home, alone with it, its socket open."""
    with home.locked():
        config = home.check()
        check_model(config.device.model.name)
        limit_memory(config.memory_limit)

        from client.agent.agent import Agent  # and with it torch, now that nothing is left to refuse

        agent = Agent.open(home)
        with listening(agent):
            yield agent
