"""Flower's own simulation, as everything here starts it: one process a message, Ray without its dashboard."""

from __future__ import annotations

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation


def simulate(server: ServerApp, client: ClientApp, nodes: int, gpus_per_client: float = 0.0) -> None:
    """Runs until the server's app returns. Ray puts the working directory first on its workers' path."""
    run_simulation(
        server,
        client,
        num_supernodes=nodes,
        backend_config={
            "init_args": {"include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": gpus_per_client},
        },
    )
