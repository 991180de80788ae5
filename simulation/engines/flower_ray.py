"""Flower's own simulation, as everything here starts it: one process a message, Ray without its dashboard.

Flower gives its grid to an app that it runs in a thread. Here that app hands the grid on, so that what uses it is the
main thread, which hears signals and whose errors end the program.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any

import psutil
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.supercore.run import Run

from florilegium.privacy.common.errors import UserError
from florilegium.simulation.engines.ray_cluster import Wish, open_cluster
from florilegium.simulation.runs.stopping import end_all

LOST = (ErrorCode.UNKNOWN, ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED)  # nobody was there to answer
PAUSE_S = 0.1  # between two looks for replies
END_TIMEOUT_S = 15.0
Told = Callable[[int], None]  # so many devices have answered


class LostProcessError(UserError):
    """Processes of Flower's simulation, or its nodes, ended before they answered."""


class WatchedGrid(Grid):
    """Flower's grid; replies are passed on as they come. One that nobody could make, or that an app's bug made an
    error of, ends the run.
    """

    def __init__(
        self, grid: Grid, answered: Told = lambda devices: None, check: Callable[[], None] = lambda: None
    ) -> None:
        """`check` raises where there will be no replies."""
        self.grid, self.answered, self.check = grid, answered, check

    def set_run(self, run: Run) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Run:
        return self.grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Raises `LostProcessError`."""
        asked = list(messages)
        sought = bool(asked) and asked[0].metadata.message_type != MessageType.QUERY
        waiting, done = set(self.push_messages(asked)), 0
        until = None if timeout is None else time.monotonic() + timeout
        while waiting and (until is None or time.monotonic() < until):
            self.check()
            replies = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            _refuse_errors(replies, done, len(asked), sought)
            done += len(replies)
            if sought and replies:
                self.answered(len(replies))
            yield from replies
            if not replies:
                time.sleep(PAUSE_S)


def _refuse_errors(replies: Iterable[Message], done: int, asked: int, sought: bool) -> None:
    """Raises what the replies tell of processes that were lost and of bugs."""
    failed = [reply.error for reply in replies if reply.has_error()]
    lost = [error for error in failed if error.code in LOST]
    if lost:
        kept = "; what was finished is kept: go on with --resume" if sought else ""
        raise LostProcessError(
            f"{len(lost)} of {asked} visits were lost after {done} were answered, because a process of Flower's "
            f"simulation ended: {_last_line(lost[0].reason)}{kept}"
        )
    if failed:
        raise RuntimeError(f"a client's app failed: {failed[0].reason}")


def _last_line(reason: str | None) -> str:
    return (reason or "no reason was given").strip().splitlines()[-1].removesuffix("'>")


@contextmanager
def stock_grid(
    client: ClientApp,
    nodes: int,
    folder: Path,
    answered: Told = lambda devices: None,
    gpus_per_client: float = 0.0,
) -> Iterator[Grid]:
    """The grid of a simulation of so many nodes; Ray's processes work in `folder`, and end with the context.

    Raises `ClusterError`.
    """
    handed: Queue[Grid] = Queue()
    failed: Queue[BaseException] = Queue()
    over, server = Event(), ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        handed.put(grid)
        over.wait()

    def simulate() -> None:
        try:
            resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus_per_client}
            run_simulation(server, client, nodes, backend_config={"client_resources": resources})
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            failed.put(error)

    def check() -> None:
        with suppress(Empty):
            raise RuntimeError("Flower's simulation ended by itself") from failed.get_nowait()

    with _quiet(), open_cluster(folder, Wish(1, 1, gpus_per_client)):
        runtime = Thread(target=simulate, daemon=True)
        runtime.start()
        try:
            grid = WatchedGrid(_handed(handed, check), answered, check)
            _await_nodes(grid, nodes, check)
            yield grid
        except BaseException:
            _end_clients()  # they may be in the middle of something long
            raise
        finally:
            over.set()
            runtime.join(END_TIMEOUT_S)


def _handed(handed: Queue[Grid], check: Callable[[], None]) -> Grid:
    while True:
        check()
        with suppress(Empty):
            return handed.get(timeout=0.1)


def _await_nodes(grid: Grid, nodes: int, check: Callable[[], None]) -> None:
    """Flower starts an app beside its nodes, which may come later."""
    while len(list(grid.get_node_ids())) < nodes:
        check()
        time.sleep(PAUSE_S)


def _end_clients() -> None:
    """Ends those of Ray that have devices in them."""
    end_all([p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::ClientApp")])


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower and Ray say at length, of each process and each message, what is told here in a line."""
    from ray._private import worker  # there is no setting against its notes on processes that are gone

    logger = logging.getLogger("flwr")
    level, told = logger.level, worker.print_to_stdstream
    logger.setLevel(logging.CRITICAL)
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        logger.setLevel(level)
        worker.print_to_stdstream = told
