"""A server that has been updated, or a device: one on each side of a minor version of Flower."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import pytest
from test_deployment import Serving, free_port, new_device, told

from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.supernode import PUBLIC_KEY, connected, prepare
from florilegium.client.agent.terms import read_terms
from florilegium.client.lm.model import LanguageModel
from florilegium.simulation.cli.doctor import TRIED
from florilegium.simulation.deployment.certificates import CA
from florilegium.simulation.runs.folder import RunFolder

OTHER = next(v for v in TRIED["flwr"] if not version("flwr").startswith(v.rpartition(".")[0]))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has everything of this one, but the other Flower."""
    home = tmp_path_factory.mktemp("flower") / "venv"
    subprocess.run(["uv", "venv", "-q", "--python", sys.executable, home], check=True)
    python = home / "bin" / "python"
    command = ["uv", "pip", "install", "-q", "--no-deps", "--python", python, f"flwr=={OTHER}"]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"Flower {OTHER} cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    own, theirs = sysconfig.get_paths()["purelib"], f"{sys.version_info.major}.{sys.version_info.minor}"
    places = home / "lib" / f"python{theirs}" / "site-packages" / "after.pth"
    places.write_text(f"import site; site.addsitedir({own!r})\n")
    asked = [python, "-c", "from importlib.metadata import version; import torch; print(version('flwr'))"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == OTHER
    return python


@pytest.mark.slow
@pytest.mark.parametrize("updated", ["server", "device"])
def test_a_round_between_two_versions(updated: str, other: Path, tmp_path: Path, lm: LanguageModel) -> None:
    """One side has this Flower, the other one the other; the round is aggregated and comes back to the device."""
    folder, port, home = tmp_path / "server", free_port(), DeviceFolder(tmp_path / "device")
    told("server", "init", folder, "--name", "orchard", "--host", "127.0.0.1", "--rounds", 1, "--least-epsilon", 4)
    agent = new_device(home, lm)
    prepare(home.supernode, folder / CA)
    agent.join(read_terms(folder / "terms.toml"), f"127.0.0.1:{port}")
    told("server", "admit", folder, "device", home.supernode / PUBLIC_KEY)
    ours, theirs = sys.executable, str(other)
    serves, asks = (theirs, ours) if updated == "device" else (ours, theirs)
    command = [serves, "-m", "florilegium", "server", "start", str(folder), "--port", str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        with ExitStack() as running:
            if asks == ours:
                running.enter_context(connected(agent))
            else:
                serving = Serving(home, asks)
                running.callback(serving.kill)
            said, _ = server.communicate(timeout=500)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
    assert server.returncode == 0 and "round 1: 1 releases" in said, said
    last = RunFolder(folder).last_shared()
    assert last and last.round == 1 and [s.round for s in agent.device.vault.releases()] == [1]
    assert agent.device.newest()[1] == 1
