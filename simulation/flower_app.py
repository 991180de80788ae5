"""The apps that Flower starts with `flwr run .`; the client's is that of this project's `engine = "flower"` too.

A simulated device is named after its partition. Its stream and its state are in the run's folder; nothing of it
is in Flower's context.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from florilegium.client.flower_arrays import on_a_wire
from florilegium.client.flower_replies import answer, refusal
from florilegium.privacy.reply_gate import FAILED, NO_DEVICE
from florilegium.privacy.secure_aggregation.wire import STEPS
from florilegium.simulation.baselines.devices import load_run_devices, run_devices_of_worker
from florilegium.simulation.config import load_config
from florilegium.simulation.devices.people import device_name
from florilegium.simulation.devices.simulated import SimulatedDevices, forget_sessions
from florilegium.simulation.engines.faults import attempt, leave
from florilegium.simulation.engines.flower_ray import WatchedGrid
from florilegium.simulation.engines.scheduler import Scheduler
from florilegium.simulation.engines.workers import LocalWorkers
from florilegium.simulation.recorder import federate_run
from florilegium.simulation.runs.folder import RunFolder, create
from florilegium.simulation.runs.summary import write_summary
from florilegium.simulation.settings import find_config

log = logging.getLogger(__name__)
RUN_VARIABLE = "FLORILEGIUM_RUN"  # how the apps of Flower's own engine find the run's folder
client_app = ClientApp()
server_app = ServerApp()


def run_path(context: Context) -> Path:
    """The run's folder: named by the environment, or after the id that Flower gave the run."""
    named = os.environ.get(RUN_VARIABLE)
    if named:
        return Path(named)
    runs = Path(str(context.run_config["runs"])).expanduser()
    return (runs if runs.is_absolute() else Path.home() / runs) / f"flwr-{context.run_id}"


def _answer(message: Message, context: Context) -> Message:
    """One device's reply. The server gets a code for what went wrong; the driver finds it in the run's folder."""
    run, name = RunFolder(run_path(context)), device_name(int(str(context.node_config["partition-id"])))
    what = "adoption" if message.metadata.message_type == MessageType.EVALUATE else "release"
    try:
        devices = run_devices_of_worker(run.path)
        if name not in devices.users:
            return refusal(NO_DEVICE).to(message)
        found = attempt(_replied, run.config.engine.on_device_error == "count", devices, [name], message)
        if not found.failed:
            return on_a_wire(found.results[0][1])
        leave(run.faults, name, what, found.failed[name])
    except Exception as error:  # noqa: BLE001  # the driver raises it
        leave(run.faults, name, what, error)
    return refusal(FAILED).to(message)


def _replied(devices: SimulatedDevices, names: Sequence[str], message: Message) -> Message:
    return answer([message], names, devices)[0]


@client_app.query()
def hello(message: Message, context: Context) -> Message:
    return _answer(message, context)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    return _answer(message, context)


@client_app.evaluate()
def adopt(message: Message, context: Context) -> Message:
    return _answer(message, context)


for step in STEPS:  # of secure aggregation
    client_app.query(step.partition(".")[2])(_answer)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Federates over the grid that Flower passes: a device for each of its nodes."""
    path = run_path(context)
    if not (path / "config.toml").exists():
        nodes = len(list(grid.get_node_ids()))
        create(path, load_config(find_config(str(context.run_config["config"])), [f"data.users={nodes}"]))
    run = RunFolder(path)
    devices = load_run_devices(run)
    forget_sessions(run)
    federate_run(run, WatchedGrid(grid), Scheduler(LocalWorkers(devices), devices))
    write_summary(run)
    log.warning("for the report: florilegium report %s", path)
