"""Real devices and a real server on one machine: TLS, keys, rounds, a kill, a refusal."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.x509 import load_pem_x509_certificate
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer import Typer
from typer.testing import CliRunner

from florilegium.client.agent.agent import Agent
from florilegium.client.agent.cli import app as device_app
from florilegium.client.agent.config import new_config
from florilegium.client.agent.device import SESSION, Device
from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.signature import public_half
from florilegium.client.agent.supernode import PUBLIC_KEY, REASONS, connected, prepare
from florilegium.client.agent.terms import Terms, read_terms, write_terms
from florilegium.client.agent.vault import Vault
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.privacy.release import PROTOCOL
from florilegium.server.config import ServerConfig
from florilegium.server.release_collector import RoundFacts, to_arrays
from florilegium.simulation.benchmarks.poisoning import RULES, Measured, _measured
from florilegium.simulation.cli.server import app as server_app
from florilegium.simulation.config import load_config
from florilegium.simulation.data.population import load_population
from florilegium.simulation.deployment.certificates import CA, CERTIFICATE, KEY, STATUS_LINK, make_certificates
from florilegium.simulation.deployment.link import Link
from florilegium.simulation.deployment.register import admit, expel
from florilegium.simulation.deployment.registrar import REGISTRAR_KEY
from florilegium.simulation.deployment.rounds import layout_of, make_folder, serving, strategy_of
from florilegium.simulation.deployment.settings import check_rule
from florilegium.simulation.deployment.status import came_to
from florilegium.simulation.deployment.sums import sum_terms
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.settings import find_config

FLORILEGIUM = (sys.executable, "-m", "florilegium")
SAID = (("Do you like apples?", "Only green ones."), ("What now?", "Soup with ginger."), ("And then?", "A long walk."))


def told(*arguments: str | Path | int) -> None:
    """What its owner would type."""
    done = subprocess.run([*FLORILEGIUM, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def typed(app: Typer, *arguments: str | Path | float) -> str:
    """The same in this process; returns what it shows."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output.replace("\n", " ")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_certificates_are_of_the_hosts_and_made_once(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["localhost", "127.0.0.1"])
    server = load_pem_x509_certificate((tmp_path / CERTIFICATE).read_bytes())
    authority = load_pem_x509_certificate((tmp_path / CA).read_bytes())
    server.verify_directly_issued_by(authority)
    assert (tmp_path / KEY).stat().st_mode & 0o777 == 0o600
    with pytest.raises(DeviceError, match="certificates already"):
        make_certificates(tmp_path, ["localhost"])


def test_terms_are_public_and_say_nothing_of_a_budget(tmp_path: Path) -> None:
    write_terms(tmp_path / "terms.toml", Terms(name="orchard", rounds=5))
    assert read_terms(tmp_path / "terms.toml") == Terms(name="orchard", rounds=5)
    (tmp_path / "terms.toml").write_text('name = "orchard"\n[privacy]\nepsilon = 100\n')
    with pytest.raises(DeviceError, match="unknown key 'privacy'"):
        read_terms(tmp_path / "terms.toml")


def new_device(home: DeviceFolder, lm: LanguageModel, **privacy: float | str) -> Agent:
    """With a few dialogues that its owner has answered."""
    config = new_config(ModelConfig(name="nano"))
    limits = config.device.privacy.model_copy(update=privacy)
    config = config.model_copy(update={"device": config.device.model_copy(update={"privacy": limits})})
    agent = Agent(Device(home, config, lm, home.make(config)))
    agent.consent("learn", True)
    agent.consent("federate", True)
    for prompt, wanted in SAID:
        agent.rate(agent.device.vault.add(prompt, "hm", "").id, False, wanted)
    return agent


class Serving:
    """An agent's process."""

    def __init__(self, home: DeviceFolder, python: str = sys.executable) -> None:
        self.home, self.python = home, python
        self.start()

    def start(self) -> None:
        command = [
            self.python,
            "-m",
            "florilegium",
            "device",
            "serve",
            "--home",
            str(self.home.path),
            "--port",
            "0",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        assert self.process.stdout and "http://127.0.0.1" in self.process.stdout.readline()

    def kill(self, alone: bool = False) -> None:
        """The whole group at once, as when the power fails; or the agent alone, as when the memory is full."""
        (os.kill if alone else os.killpg)(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_a_release_is_bounded_by_what_its_noise_allows(tmp_path: Path) -> None:
    """The norm that the terms name passes a device's longest honest release and nothing like a poisoned one."""
    for name in ("strict", "loose"):
        (tmp_path / name).mkdir()
    terms = Terms(name="orchard", min_devices=3)
    strict, loose = (
        make_folder(tmp_path / name, terms, ServerConfig(rule="trimmed-mean", trimmed_share=0.34), epsilon)
        for name, epsilon in (("strict", 8.0), ("loose", 1.0))
    )
    assert 1 < strict.largest_norm_l2 < loose.largest_norm_l2 < 100
    strategy, arrays = strategy_of(tmp_path / "strict", Link(), layout_of(terms), print)
    assert (strategy.limits.largest_norm_l2, strategy.config.rule) == (strict.largest_norm_l2, "trimmed-mean")
    strategy.nodes = {f"device-{k}": k for k in range(4)}
    strategy.names, strategy.devices = sorted(strategy.nodes), {k: name for name, k in strategy.nodes.items()}
    strategy._sent = arrays
    width, places = strategy.schema.width, strategy.schema.of_round(1)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def sent(node: int, norm: float) -> Message:
        row = np.full(width, norm / np.sqrt(width), np.float32)
        header = ConfigRecord({"protocol": PROTOCOL, "version": 0, "head": "0" * 64})
        content = RecordDict({"header": header, "arrays": to_arrays(places.split(row))})
        asked = Message(RecordDict(), dst_node_id=node, message_type="train")
        reply = Message(content, reply_to=asked)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    honest, false = 0.9 * strict.largest_norm_l2, (1.01 * strict.largest_norm_l2, 1e6, float("inf"))
    one, _ = strategy.aggregate_train(1, [sent(0, honest), *(sent(k + 1, norm) for k, norm in enumerate(false))])
    assert one is None and strategy.facts[1].releases == 1  # and one alone is not aggregated
    assert strategy.facts[1].refused == {"too-large": 2, "malformed": 1, "too-few": 1}
    three, _ = strategy.aggregate_train(1, [sent(0, honest), sent(1, 0.0), sent(2, 1e6), sent(3, honest)])
    assert three is not None and strategy.facts[1].releases == 3


@pytest.mark.parametrize(
    ("rule", "needed"),
    [
        ({"rule": "krum", "byzantine": 1}, 5),
        ({"rule": "krum", "byzantine": 1, "krum_keep": 8}, 9),
        ({"rule": "trimmed-mean", "trimmed_share": 0.3}, 4),
        ({"rule": "trimmed-mean", "trimmed_share": 0.0}, 1),
        ({}, 1),
    ],
)
def test_a_rule_has_the_releases_that_it_needs_or_there_is_no_server(
    tmp_path: Path, rule: dict[str, Any], needed: int
) -> None:
    check_rule(ServerConfig(**rule), Terms(name="orchard", min_devices=needed))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in rule.items()]
    asked = ["init", str(tmp_path / "s"), "--name=orchard", "--host=x", f"--min-devices={needed - 1}", *options]
    done = CliRunner().invoke(server_app, asked)
    if needed == 1:
        assert done.exit_code == 2  # an option of 0
    else:
        assert isinstance(done.exception, DeviceError) and f"--min-devices {needed}" in str(done.exception)
    assert not (tmp_path / "s").exists()


def test_a_round_is_told_in_a_line() -> None:
    facts = RoundFacts(releases=4, refused={"too-large": 1, "malformed": 2, "too-few": 4})
    assert came_to(facts, 5) == "not aggregated: 4 releases of the 5 that it needs, 2 malformed, 1 too-large"
    assert came_to(RoundFacts(releases=5, refused={"no-release": 1}), 5) == "5 releases, 1 no-release"


@pytest.mark.slow
def test_a_poisoned_minority_is_measured() -> None:
    """Three of ten send what they like: unbounded they are refused; bounded, a trimmed mean holds, a mean does not."""
    config = load_config(find_config("quickstart"), ["data.users=10", "data.min_pairs=60"])
    lm, users = LanguageModel.load(config.model), load_population(config.data, config.seed)
    mean, trimmed = RULES[:2]

    def seen(rule: ServerConfig, way: str) -> Measured:
        return _measured(lm, config, users, rule, 3, way, 4.0, 0)

    beyond, against, held = seen(mean, "unbounded"), seen(mean, "against"), seen(trimmed, "against")
    assert beyond.refused == 9 and abs(beyond.nll - beyond.base) < 0.1
    assert against.refused == 0 and against.nll > against.base + 0.5 and held.nll < held.base + 0.2


@pytest.mark.slow
def test_three_devices_a_server_and_what_goes_wrong(tmp_path: Path, lm: LanguageModel) -> None:
    """Three rounds; one device is killed and started again, one has its budget spent, one takes its consent back.

    The last one is not even seen: the two others are those that the server waits for.
    """
    folder, port = tmp_path / "server", free_port()
    told("server", "init", folder, "--name", "orchard", "--host", "127.0.0.1", "--host", "localhost", "--rounds", 3,
         "--min-devices", 2, "--patience-s", 240, "--least-epsilon", 0.5)  # fmt: skip
    homes = [DeviceFolder(tmp_path / name) for name in ("steady", "spent", "silent")]
    steady, spent, silent = (
        new_device(home, lm, **({"epsilon": 1.0, "releases": 1} if home is homes[1] else {})) for home in homes
    )
    told("device", "join", folder / "terms.toml", "--server", f"127.0.0.1:{port}", "--certificates", folder / CA,
         "--yes", "--home", homes[0].path)  # fmt: skip
    for agent in (spent, silent):
        prepare(agent.device.folder.supernode, folder / CA)
        agent.join(read_terms(folder / "terms.toml"), f"127.0.0.1:{port}")
    silent.consent("federate", False)
    for home in homes:
        told("server", "admit", folder, home.path.name, home.supernode / PUBLIC_KEY)
    assert steady.device.membership == silent.device.membership and steady.device.membership
    agents = [Serving(home) for home in homes]
    command = [sys.executable, "-m", "florilegium", "server", "start", str(folder), "--port", str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        run = RunFolder(folder)
        until = time.monotonic() + 400
        while not (run.aggregate(1) or (run.last_shared() and run.last_shared().round >= 1)):  # type: ignore[union-attr]
            assert time.monotonic() < until and server.poll() is None, (folder / "server.log").read_text()[-3000:]
            time.sleep(0.2)
        agents[0].kill(alone=True)
        agents[0].start()
        said, _ = server.communicate(timeout=400)
        assert server.returncode == 0, said
    finally:
        for serving in agents:
            serving.kill()
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
    last = run.last_shared()
    assert last and last.round == 3
    opened = [Agent(Device(h, h.config(), lm, h.read_key(h.config()))) for h in homes]
    sent = [[s.round for s in agent.device.vault.releases()] for agent in opened]
    assert 1 in sent[0] and 3 in sent[0] and sent[1] == [1] and sent[2] == []
    start, first, after = (run.shared(n).shared for n in (0, 1, 3))
    facts = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    rounds = [f for f in facts if f["event"] == "round"]
    assert [f["releases"] for f in rounds] == [2, 0, 1] or [f["releases"] for f in rounds] == [2, 1, 1]
    assert rounds[-1]["refused"] == {"no-release": 1, "too-few": 1}  # one release is nobody's but its device's
    change = np.concatenate([(first[name] - start[name]).ravel() for name in start])
    assert 0 < float(np.linalg.norm(change)) < read_terms(folder / "terms.toml").largest_norm_l2
    assert all(np.array_equal(first[name], after[name]) for name in first)
    text = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert not any(reply.encode() in text for _, reply in SAID)


@pytest.mark.slow
def test_four_devices_add_their_noise_together_and_one_is_killed_as_it_learns(
    tmp_path: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registrar, a server and four processes; one is gone once it has the others' parts: the sum is of who came."""
    monkeypatch.chdir(tmp_path)
    folder, registrar, port = tmp_path / "server", tmp_path / "registrar", free_port()
    typed(server_app, "registrar", "new", registrar)
    public = public_half((registrar / REGISTRAR_KEY).read_bytes())
    typed(server_app, "init", folder, "--name", "orchard", "--host", "127.0.0.1", "--rounds", 1, "--patience-s", 120,
          "--mode", "user-distributed", "--registrar", public, "--devices", 4, "--survivors", 3, "--min-devices", 4,
          "--clip-norm-l2", 0.05)  # fmt: skip
    homes = [DeviceFolder(tmp_path / name) for name in ("ada", "ben", "cleo", "dan")]
    for home in homes:
        agent = new_device(home, lm, mode="user-distributed")
        home.write_config(agent.device.config)
        shown = typed(device_app, "identity", folder / "terms.toml", "--home", home.path)
        typed(server_app, "registrar", "sign", registrar, folder / "terms.toml", home.path.name, shown.strip())
        joining = typed(device_app, "join", folder / "terms.toml", "--server", f"127.0.0.1:{port}", "--certificates",
                        folder / CA, "--registration", f"{home.path.name}.registration", "--yes",
                        "--home", home.path)  # fmt: skip
        assert f"said by the registrar, {public}" in joining
        admit(folder, home.path.name, str(home.supernode / PUBLIC_KEY))
        agent.device.vault.set_fact("pace", 1.0)  # rehearsed before
    command = [sys.executable, "-m", "florilegium", "server", "start", str(folder), "--port", str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert server.stdout and "may connect" in server.stdout.readline()
    with ThreadPoolExecutor() as starting:  # a SuperNode that is early tries again late
        agents = list(starting.map(Serving, homes))
    try:
        until, last = time.monotonic() + 300, Vault(homes[3].vault, homes[3].read_key(homes[3].config()))
        while not (kept := last.fact(SESSION, {})) or not kept["told"]["members"]:
            assert time.monotonic() < until and server.poll() is None, (folder / "server.log").read_text()[-3000:]
            time.sleep(0.05)
        agents[3].kill()
        expel(folder, "dan")  # or the server waits for as long as its terms say
        said, _ = server.communicate(timeout=300)
    finally:
        for serving in agents[:3]:
            serving.kill()
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
    assert server.returncode == 0 and "round 1: 3 releases" in said.replace("4 releases", "3 releases"), said
    run, terms = RunFolder(folder), read_terms(folder / "terms.toml")
    (facts,) = [f for line in run.metrics.read_text().splitlines() if (f := json.loads(line))["event"] == "round"]
    devices = [Agent(Device(h, h.config(), lm, h.read_key(h.config()))).device for h in homes]
    parts = [device.state().sent for device in devices[: facts["releases"]]]
    sums = sum_terms(terms, layout_of(terms))
    assert sums and len(parts) in (3, 4)
    row = sums.code(1).decoded(sum(part.numpy() for part in parts if part is not None))
    start, first = (np.concatenate([a.ravel() for a in run.shared(n).shared.values()]) for n in (0, 1))
    assert np.array_equal(first, start + (row / len(parts)).astype(np.float32))
    assert float(row.std()) == pytest.approx(math.sqrt(len(parts)) * sums.code(1).share_std, rel=0.05)
    for device in devices[:3]:
        account = device.ledger.account(device.state().id, device.state().genesis)
        assert account and [e.round for e in account.entries] == [1] and device.vault.fact(SESSION, None) is None


@pytest.mark.slow
def test_who_does_not_know_the_other_stays_apart(
    tmp_path: Path, lm: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Of three devices one has the certificate of another server, one a key that the server does not know."""
    folder, port = tmp_path / "server", free_port()
    told("server", "init", folder, "--name", "orchard", "--host", "127.0.0.1", "--rounds", 3, "--least-epsilon", 8)
    address = f"127.0.0.1:{port}"
    agents = {}
    for name in ("known", "misled", "stranger"):
        home = DeviceFolder(tmp_path / name)
        agents[name] = new_device(home, lm)
        authority = make_certificates(tmp_path / "another", ["127.0.0.1"]) if name == "misled" else folder / CA
        public = prepare(home.supernode, authority)
        if name != "stranger":
            admit(folder, name, str(public))
        agents[name].join(read_terms(folder / "terms.toml"), address)
    with ExitStack() as running:
        layout = layout_of(read_terms(folder / "terms.toml"))
        link = running.enter_context(serving(folder, "127.0.0.1", port, layout, print, 0))
        for agent in agents.values():
            running.enter_context(connected(agent))
        until = time.monotonic() + 300
        while not all(text in caplog.text for text in REASONS.values()) or set(link.online()) != {"known"}:
            assert time.monotonic() < until, caplog.text
            time.sleep(1)
        page, _, token = (folder / STATUS_LINK).read_text().strip().partition("#token=")
        metrics = httpx.get(f"{page}metrics", headers={"authorization": f"Bearer {token}"}, trust_env=False).text
        assert "florilegium_devices_connected 1.0" in metrics and '{answer="this key is not admitted"}' in metrics
        admit(folder, "late", str(agents["stranger"].device.folder.supernode / PUBLIC_KEY))  # while the server runs
        while set(link.online()) != {"known", "late"}:
            assert time.monotonic() < until, caplog.text
            time.sleep(1)
