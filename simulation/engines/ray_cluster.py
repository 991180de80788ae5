"""Ray, as a simulation starts it on this machine or joins it elsewhere.

What is missing is told at once: a cluster that is not there, room for what is asked of it, a folder for its sockets.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florilegium.privacy.common.errors import UserError
from florilegium.simulation.config import place_of

CONNECT_TIMEOUT_S = 5.0
NOT_STARTED = ("timed out during startup", "Failed to start GCS", "Failed to connect to GCS")  # so Ray says


class ClusterError(UserError):
    """Ray cannot be started or joined, or has no room for what is asked."""


@dataclass(frozen=True)
class Wish:
    """Processes, and what each needs."""

    actors: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.actors} processes, each with {self.cpus:g} CPUs and {self.gpus:g} GPUs"

    def fits(self, resources: dict[str, float]) -> int:
        """How many of them a node has room for."""
        wanted = [(resources.get(name, 0.0), amount) for name, amount in (("CPU", self.cpus), ("GPU", self.gpus))]
        return min(int(there / amount + 1e-9) for there, amount in wanted if amount)


@contextmanager
def open_cluster(folder: Path, wish: Wish, address: str = "", cpus: int | None = None) -> Iterator[Any]:
    """Ray, in this process: of its own with so many CPUs (None: all), whatever RAY_ADDRESS says, or at an address.

    Raises `ClusterError`. It ends with the context.
    """
    import ray

    with chdir(folder):  # Ray puts the working directory first on its workers' path: no foreign client.py there
        try:
            if address:
                _reach(address)
                _init(ray, address=address)
            else:
                _init(ray, address="local", include_dashboard=False, num_cpus=cpus)
            _check_room(ray, wish)
            yield ray
        finally:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raises where nobody listens, or somebody who does not speak gRPC; Ray itself would go on asking for minutes."""
    if address in ("auto", "local"):
        return
    place = place_of(address)
    if not place:
        raise ClusterError(f"ray.address = {address!r} must be HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection(place, CONNECT_TIMEOUT_S).close()
        _await_grpc(*place)
    except OSError as error:
        raise ClusterError(
            f"ray.address = {address!r}: no cluster can be reached there ({error}); start one with: ray start --head"
        ) from None


def _await_grpc(host: str, port: int) -> None:
    """Raises `OSError` where the other side does not take part in HTTP/2, as Ray's does."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # it takes nobody without a certificate
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            raise OSError("something else listens there") from None


def _init(ray: Any, **options: Any) -> None:
    """`ray.init`, which takes SIGTERM from whoever listens to it."""
    heard = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
    except ConnectionError as error:
        raise ClusterError(f"ray.address = {options['address']!r}: {error}") from None
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise ClusterError(
            f"{variable} = {os.environ.get(variable)!r} is too long for the names of Ray's sockets, which the system "
            f"limits; set RAY_TMPDIR to a short folder, such as /tmp ({error})"
        ) from None
    except Exception as error:
        if not any(sign in str(error) for sign in NOT_STARTED):
            raise
        told = str(error).splitlines()[0].split(". ")[0]
        raise ClusterError(
            f"Ray did not start: {told}; the machine may be too busy, or another Ray in the way: try again, or "
            f"look into {_logs()}"
        ) from None
    if callable(heard) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, heard)


def _logs() -> Path:
    """Where Ray's processes write, of the cluster that was started last."""
    return Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))) / "ray" / "session_latest" / "logs"


def _check_room(ray: Any, wish: Wish) -> None:
    """Raises where not all processes have a place, before anybody waits for one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(wish.fits(node) for node in nodes)
    if room < wish.actors:
        there = ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise ClusterError(
            f"{wish} are asked for; Ray has room for {room}: {len(nodes)} nodes with {there}; lower [ray], or add nodes"
        )
