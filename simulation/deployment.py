"""A server for real devices: Flower's SuperLink, and the app that asks, aggregates and stores.

The SuperLink knows devices by keys that its operator registers. Whoever reaches its port could register keys and start
runs as well, as Flower 1.41 gives its control interface no accounts: let only `/v1/fleet/` through to the world.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import tomli_w
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from client.agent.courier import flower_environment
from client.agent.home import DeviceError
from client.agent.terms import Terms, read_terms
from client.app import refusal
from client.lm.config import ModelConfig
from client.lm.model import LanguageModel
from client.phases import release_schema
from privacy.gate import NO_DEVICE
from privacy.noise import ReleaseNoise
from privacy.seeds import derive_seed
from server.config import ServerConfig
from server.intake import to_arrays, to_numpy
from server.optimizers import Moments
from server.strategy import ReleaseStrategy
from simulation.certificates import CA, CERTIFICATE, KEY, NODES, TERMS, check_folder
from simulation.experiment import commit, committed
from simulation.runs import RunFolder

log = logging.getLogger(__name__)
BIN = Path(sys.executable).parent
CONNECTION = "florilegium"
APP = """[project]
name = "florilegium-server"
version = "1"
description = "The rounds of a federation"
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "florilegium"
fab-include = ["florilegium_server.py"]

[tool.flwr.app.components]
serverapp = "florilegium_server:server_app"
clientapp = "florilegium_server:client_app"
"""
MODULE = """from simulation import deployment

server_app = deployment.server_app
client_app = deployment.client_app
"""
FOLDER_VARIABLE = "FLORILEGIUM_SERVER"
READY_S = 60.0
server_app, client_app = ServerApp(), ClientApp()


# -- the app ----------------------------------------------------------------------------------------------------------


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds of the terms; what a round came to is stored before any device gets it."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    terms, run = read_terms(folder / TERMS), RunFolder(folder)
    strategy, arrays = strategy_of(terms, run)

    def over(number: int, shared: ArrayRecord) -> None:
        run.save_shared(number, to_numpy(shared), strategy.heads, strategy.moments.arrays())
        if number:
            run.record("round", round=number, **asdict(strategy.facts[number]))
        if number < terms.rounds:
            enough()

    def enough() -> None:
        """Waits for so many devices as a round is to have."""
        while len(list(grid.get_node_ids())) < terms.min_devices:
            time.sleep(1)

    enough()
    strategy.start(grid, arrays, terms.rounds, terms.patience_s, evaluate_fn=over)


@client_app.train()
def unknown(message: Message, context: Context) -> Message:
    """Devices run their own code, never this: it answers where somebody runs the bundle as it is."""
    return refusal(NO_DEVICE).to(message)


def strategy_of(terms: Terms, run: RunFolder) -> tuple[ReleaseStrategy, ArrayRecord]:
    """Where the last process left off: a round that was aggregated is not asked for again."""
    lm = LanguageModel.load(ModelConfig(name=terms.model, dtype="float32"))
    layout = lm.lora_layout(terms.shared.adapter, public_seed=terms.seed)
    schema = release_schema(layout, terms.shared.upload)
    last = run.last_shared()
    number = last.round + 1 if last else 1
    strategy = ReleaseStrategy(
        ServerConfig(sampled_share=terms.fraction, reply_timeout_s=terms.patience_s),
        schema,
        terms.seed,
        ReleaseNoise(),  # how much devices add is theirs to know
        first_round=number,
        commit=partial(commit, run),
        committed=committed(run, number),
    )
    arrays = strategy.first(layout.start(derive_seed(terms.seed, "shared")).numpy())
    if last:
        arrays, strategy.heads, strategy.moments = to_arrays(last.shared), last.heads, Moments.of(last.moments)
    return strategy, arrays


# -- the processes ----------------------------------------------------------------------------------------------------


@contextmanager
def superlink(folder: Path, host: str, port: int) -> Iterator[None]:
    """Flower's SuperLink with this folder's certificates; devices' public keys lie in its folder `nodes`."""
    check_folder(folder)
    command = [
        str(BIN / "flower-superlink"), "--host", host, "--port", str(port),
        "--ssl-ca-certfile", str(folder / CA), "--ssl-certfile", str(folder / CERTIFICATE),
        "--ssl-keyfile", str(folder / KEY), "--enable-supernode-auth", "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    with open(folder / "superlink.log", "ab") as written:
        process = subprocess.Popen(command, env=_environment(folder), stdout=written, stderr=written)
    try:
        _wait_for_port(host, port, process)
        yield
    finally:
        process.terminate()
        process.wait()


def all_done(folder: Path) -> bool:
    """Whether the last round of the terms is stored."""
    last = RunFolder(folder).last_shared()
    return last is not None and last.round >= read_terms(folder / TERMS).rounds


def register(folder: Path, address: str) -> int:
    """Lets the devices in whose public keys lie in `nodes`; returns how many there are."""
    check_folder(folder)
    _write_connection(folder, address)
    keys = sorted((folder / NODES).glob("*.pub"))
    for key in keys:
        _flwr(folder, "supernode", "register", str(key), CONNECTION)
    return len(keys)


def run_rounds(folder: Path, address: str, tell: Callable[[str], None]) -> None:
    """All rounds of the terms, each told when it is over; raises `DeviceError` where the app ended otherwise."""
    _write_connection(folder, address)
    app = folder / "app"
    app.mkdir(exist_ok=True)
    (app / "pyproject.toml").write_text(APP, encoding="utf-8")
    (app / "florilegium_server.py").write_text(MODULE, encoding="utf-8")
    over = threading.Event()
    watching = threading.Thread(target=_tell_rounds, args=(RunFolder(folder), over, tell), daemon=True)
    watching.start()
    try:
        said = _flwr(folder, "run", str(app), CONNECTION, "--stream")
    finally:
        over.set()
        watching.join()
    if not all_done(folder):
        raise DeviceError(f"the server's app ended early; {folder / 'superlink.log'} may tell more:\n{said[-2000:]}")


def _tell_rounds(run: RunFolder, over: threading.Event, tell: Callable[[str], None]) -> None:
    """Each round's numbers, as they are recorded."""
    told = len(run.metrics.read_text(encoding="utf-8").splitlines()) if run.metrics.exists() else 0
    ending = False
    while not ending:
        ending = over.wait(1.0)  # and once more after the end
        lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else []
        for fact in map(json.loads, lines[told:]):
            tell(f"round {fact['round']}: {fact['releases']} releases")
        told = len(lines)


def _write_connection(folder: Path, address: str) -> None:
    home = folder / "flower"
    home.mkdir(exist_ok=True, mode=0o700)
    tree = {"superlink": {"default": CONNECTION, CONNECTION: {
        "address": address, "root-certificates": str((folder / CA).absolute())}}}  # fmt: skip
    (home / "config.toml").write_text(tomli_w.dumps(tree), encoding="utf-8")


def _flwr(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(BIN / "flwr"), *arguments], env=_environment(folder), capture_output=True, text=True, cwd=folder
    )
    said = done.stdout + done.stderr
    if done.returncode and "already" not in said:
        raise DeviceError(f"flwr {arguments[0]} failed: {said[-1000:]}")
    return said


def _environment(folder: Path) -> dict[str, str]:
    return {
        **flower_environment(folder / "flower"),
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        FOLDER_VARIABLE: str(folder.absolute()),
    }


def _wait_for_port(host: str, port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + READY_S
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1" if host == "0.0.0.0" else host, port)) == 0:
                return
        time.sleep(0.2)
    raise DeviceError(f"the SuperLink did not come up on {host}:{port}; see superlink.log")
