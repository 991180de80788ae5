"""What is started ends with whoever started it, and what is written is its owner's alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from florilegium.client.agent.agent import Agent
from florilegium.client.agent.config import new_config
from florilegium.client.agent.device import Device
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.signature import new_key, public_half
from florilegium.client.agent.supernode import prepare
from florilegium.client.agent.terms import Terms, read_terms
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.server.config import ServerConfig
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.deployment.certificates import CA, make_certificates
from florilegium.simulation.deployment.rounds import make_folder
from florilegium.simulation.runs.folder import create

ROOT = Path(__file__).parent.parent
FLORILEGIUM = (sys.executable, "-m", "florilegium")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(true: object, seconds: float = 60) -> bool:
    """Whether a condition comes about."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


def gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def others_may(path: Path) -> list[Path]:
    """What in a folder somebody else could read, write or enter."""
    return [p for p in (path, *path.rglob("*")) if not p.is_symlink() and p.stat().st_mode & 0o077]


def test_a_runs_folder_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run = create(tmp_path / "runs" / "new", ExperimentConfig())
    finally:
        os.umask(before)
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_a_servers_folder_is_its_operators_alone(tmp_path: Path) -> None:
    before = os.umask(0o077)  # as its command sets it
    try:
        make_certificates(tmp_path / "server", ["127.0.0.1"])
        terms = make_folder(tmp_path / "server", Terms(name="orchard"), ServerConfig(), 4.0)
    finally:
        os.umask(before)
    assert not others_may(tmp_path / "server")
    key = (tmp_path / "server" / "operator.key").read_bytes()
    assert terms == read_terms(tmp_path / "server" / "terms.toml") and terms.operator == public_half(key)
    assert terms.operator.encode() not in key and public_half(new_key()) != terms.operator


@pytest.mark.slow
def test_all_that_a_run_writes_is_its_owners_alone(tmp_path: Path) -> None:
    command = [*FLORILEGIUM, "run", "quickstart", "--runs", str(tmp_path / "runs"), "name=t", "rounds=1",
               "data.users=4", "evaluation.every_round=false"]  # fmt: skip
    environment = {**os.environ, "FLORILEGIUM_UMASK": ""}
    assert subprocess.run(command, capture_output=True, env=environment).returncode == 2  # no such umask
    environment.pop("FLORILEGIUM_UMASK")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, umask=0o022)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "t" / "report.html").exists() and not others_may(tmp_path / "runs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_that_is_told_to_end_says_so_as_a_run_does(number: signal.Signals) -> None:
    code = (
        "import signal, sys; import typer; from florilegium.simulation.cli.server import _stoppable\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "try:\n"
        f"    with _stoppable('goes on'): signal.raise_signal({int(number)})\n"
        "except typer.Exit as ended: sys.exit(ended.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (128 + number, "goes on\n"), done.stderr


LIMITED = """
import ctypes, resource, subprocess, sys
from florilegium.privacy.common.dumps import hide_memory
from florilegium.simulation.cli import main as cli

limits, setrlimit = [], resource.setrlimit
resource.setrlimit = lambda kind, to: (limits.append((kind, to)), setrlimit(kind, to))  # it may be 0 already

@cli.app.command()
def probe() -> None:
    hide_memory()
    child = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
    print((resource.RLIMIT_CORE, (0, 0)) in limits)
    print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)  # dumpable?
    subprocess.run([sys.executable, "-c", child])

sys.argv = ["florilegium", "probe"]
cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux' kernel")
def test_what_a_process_has_in_memory_is_dumped_nowhere() -> None:
    """Its own, and that of what it starts."""
    probe = [sys.executable, "-c", LIMITED]
    done = subprocess.run(probe, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n(0, 0) 0\n(0, 0)\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_ends_as_a_whole(tmp_path: Path, number: signal.Signals) -> None:
    make_certificates(tmp_path, ["127.0.0.1"])
    make_folder(tmp_path, Terms(name="orchard"), ServerConfig(), 4.0)
    port = free_port()
    command = [*FLORILEGIUM, "server", "start", str(tmp_path), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert server.stdout and "0 devices may connect" in server.stdout.readline()
    children = psutil.Process(server.pid).children(recursive=True)
    assert sys.platform != "linux" or psutil.Process(server.pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
    server.send_signal(number)
    said, _ = server.communicate(timeout=60)
    assert server.returncode == 128 + number and "goes on" in said.replace("\n", " ")
    assert not children  # one process: there is nothing that could be left behind
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next start ends what was left")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_device_ends_with_its_supernode(tmp_path: Path, lm: LanguageModel, number: signal.Signals) -> None:
    """Whose server is not there: it tries to reach it for ever."""
    home, config = DeviceFolder(tmp_path / "device"), new_config(ModelConfig(name="nano"))
    agent = Agent(Device(home, config, lm, home.make(config)))
    for item in ("learn", "federate"):
        agent.consent(item, True)  # type: ignore[arg-type]
    prepare(home.supernode, make_certificates(tmp_path / "server", ["127.0.0.1"]))
    terms = make_folder(
        tmp_path / "server", Terms(name="orchard", base=agent.device.vault.fact("base", "")), ServerConfig(), 1.0
    )
    agent.join(terms, f"127.0.0.1:{free_port()}")
    assert (tmp_path / "server" / CA).exists()
    command = [*FLORILEGIUM, "device", "serve", "--home", str(home.path), "--port", "0"]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert serving.stdout and "http://127.0.0.1" in serving.stdout.readline()
    process = psutil.Process(serving.pid)
    assert until(lambda: process.children(recursive=True))
    time.sleep(5)
    children = process.children(recursive=True)
    assert any("florilegium.client.agent.supernode_process" in " ".join(c.cmdline()) for c in children)
    assert {p.rlimit(psutil.RLIMIT_CORE) for p in (process, *children)} == {(0, 0)}
    serving.send_signal(number)
    assert serving.wait(60) == (-number if number is signal.SIGKILL else 0)
    assert until(lambda: gone(children))
