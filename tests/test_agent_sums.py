"""Real devices in a sum: what their owners agree to, what a server that lies gets, what a kill leaves behind."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

from florilegium.client.agent.agent import Agent
from florilegium.client.agent.cli import app as device_app
from florilegium.client.agent.config import new_config
from florilegium.client.agent.device import SESSION, Device
from florilegium.client.agent.errors import AgentError, DeviceError
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.registration import Registration, read_registration
from florilegium.client.agent.signature import private_key, sealed
from florilegium.client.agent.supernode import answered, prepare
from florilegium.client.agent.terms import Terms, read_terms, write_terms
from florilegium.client.calibration import planned_event, share_std
from florilegium.client.flower_arrays import on_a_wire, to_record
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.places import base_hash
from florilegium.privacy.common import database
from florilegium.privacy.secure_aggregation import wire
from florilegium.privacy.secure_aggregation.adverts import certified
from florilegium.privacy.secure_aggregation.session import Scene, Session
from florilegium.server.config import ServerConfig
from florilegium.server.secure_sum import SecureSum
from florilegium.server.strategy import NoReleaseError
from florilegium.simulation.cli.server import app as server_app
from florilegium.simulation.deployment.certificates import OPERATOR_KEY, make_certificates
from florilegium.simulation.deployment.link import Link, LinkGrid
from florilegium.simulation.deployment.register import admit, admitted
from florilegium.simulation.deployment.registrar import REGISTRAR_KEY, new_registrar, register, registered
from florilegium.simulation.deployment.rounds import came_to, layout_of, make_folder, strategy_of
from florilegium.simulation.deployment.settings import check_rule
from florilegium.simulation.deployment.sums import settings_of, sum_terms
from florilegium.simulation.rounds import Recorder, federate

SERVER = "127.0.0.1:9092"
NAMES = ("a", "b", "c", "d")
SAID = (("Do you like apples?", "Only the green ones."), ("What shall we cook?", "Pumpkin soup."), ("And?", "No."))
SUMS = {
    "mode": "user-distributed", "epsilon": 8.0, "delta": 1e-5, "clip_norm_l2": 0.05, "devices": 4, "survivors": 3,
}  # fmt: skip


@dataclass
class Orchard:
    """A server's folder, a registrar's, and what they agree on."""

    folder: Path
    registrar: Path
    terms: Terms

    def registration(self, name: str, identity: str, terms: Terms | None = None) -> Registration:
        key = private_key((self.registrar / REGISTRAR_KEY).read_bytes())
        federation = (terms or self.terms).federation
        signature = certified(key, federation, name, bytes.fromhex(identity)).hex()
        return Registration(federation=federation, device=name, identity=identity, certificate=signature)


def planted(folder: Path, **sums: Any) -> Orchard:
    public = new_registrar(folder / "registrar")
    usual = Terms(name="orchard", rounds=2, seed=1, base=base_hash("nano"), min_devices=4)
    (folder / "server").mkdir()
    made = make_folder(folder / "server", usual, ServerConfig(), 8.0, sums={**SUMS, "registrar": public, **sums})
    return Orchard(folder / "server", folder / "registrar", made)


@pytest.fixture(scope="module")
def orchard(tmp_path_factory: pytest.TempPathFactory) -> Orchard:
    return planted(tmp_path_factory.mktemp("orchard"))


def new_agent(path: Path, lm: LanguageModel, mode: str = "user-distributed", **summed: int) -> Agent:
    """With both consents and a few dialogues."""
    home, config = DeviceFolder(path), new_config(ModelConfig(name="nano"))
    told = config.device.model_dump() | {"secure_aggregation": summed}
    told["privacy"]["mode"] = mode
    told["model"]["limits"] = {"prompt_tokens": 16, "reply_tokens": 16}
    config = config.model_copy(update={"port": 0, "device": type(config.device).model_validate(told)})
    agent = Agent(Device(home, config, lm, home.make(config)))
    agent.consent("learn", True)
    agent.consent("federate", True)
    for prompt, wanted in SAID:
        agent.rate(agent.device.vault.add(prompt, "hm", "").id, False, wanted)
    return agent


def joined(path: Path, lm: LanguageModel, orchard: Orchard, name: str) -> Agent:
    assert orchard.terms.distributed
    agent = new_agent(path, lm, orchard.terms.distributed.mode)
    agent.join(orchard.terms, SERVER, orchard.registration(name, agent.identity(orchard.terms)))
    agent.device.vault.set_fact("pace", 0.25)  # and not rehearsed by every copy
    return agent


def opened(home: DeviceFolder, agent: Agent) -> Agent:
    """As after a kill: a new process on the same folder."""
    config = agent.device.config
    return Agent(Device(home, config, agent.device.lm, home.read_key(config)))


# -- what is agreed to ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel) -> Agent:
    """One that never joins anything."""
    return new_agent(tmp_path_factory.mktemp("home") / "device", lm)


def changed(terms: Terms, **sums: Any) -> Terms:
    """As a server could write them: nothing of it is checked here."""
    assert terms.distributed
    return terms.model_copy(update={"distributed": terms.distributed.model_copy(update=sums)})


@pytest.mark.parametrize(
    ("sums", "told"),
    [
        ({"noise_multiplier": 0.5}, "noise_multiplier = 0.5; epsilon = 8"),
        ({"epsilon": 9.0}, "epsilon = 9, above this device's"),
        ({"delta": 1e-4}, "delta = 0.0001, above"),
        ({"epsilon": 4.0}, "by this device's own accounting"),
        ({"survivors": 2}, "3 at least"),
        ({"devices": 2, "survivors": 2}, "3 at least"),
        ({"devices": 6}, "must survive, 4"),
        ({"colluding": 1}, "3 must be honest"),
        ({"devices": 100, "survivors": 80}, "cannot hold the sum of 100 devices"),  # in 8 bits
        ({"mode": "example-distributed"}, "is set to 'user-distributed'"),
    ],
)
def test_terms_that_would_protect_less_are_refused_before_anything_is_sent(
    alone: Agent, orchard: Orchard, sums: dict[str, Any], told: str
) -> None:
    terms = changed(orchard.terms, **sums)
    with pytest.raises(AgentError, match=told):
        alone.join(terms, SERVER, orchard.registration("a", alone.identity(terms), terms))
    assert alone.device.membership is None and not alone.device.vault.sent()


def test_a_file_of_terms_with_sums_of_two_or_of_too_many_is_none(tmp_path: Path, orchard: Orchard) -> None:
    """Above 128 devices a server that lies could choose who knows whom: no terms of real devices go there."""
    for wrong in (
        {"devices": 2},
        {"devices": 129},
        {"survivors": 2},
        {"colluding": 1},
        {"bits": 40},
        {"registrar": ""},
    ):
        write_terms(tmp_path / "terms.toml", changed(orchard.terms, **wrong))
        with pytest.raises(DeviceError, match="is not the terms of a federation"):
            read_terms(tmp_path / "terms.toml")
    own = {"operator": orchard.terms.distributed.registrar if orchard.terms.distributed else ""}
    for wrong in ({"largest_norm_l2": 1.0}, {"min_devices": 2}, {"min_devices": 5}, own):
        write_terms(tmp_path / "terms.toml", orchard.terms.model_copy(update=wrong))
        with pytest.raises(DeviceError, match=next(iter(wrong))):
            read_terms(tmp_path / "terms.toml")
    write_terms(tmp_path / "terms.toml", orchard.terms)
    assert read_terms(tmp_path / "terms.toml") == orchard.terms
    assert read_terms(tmp_path / "terms.toml").federation == orchard.terms.federation


def test_an_owner_may_want_more_than_the_terms_and_less_mode_is_none(
    tmp_path: Path, lm: LanguageModel, orchard: Orchard
) -> None:
    for own in ({"devices": 4, "survivors": 4}, {"devices": 3, "survivors": 3}, {"devices": 4, "bits": 30}):
        agent = new_agent(tmp_path / f"{len(list(tmp_path.iterdir()))}", lm, **own)
        with pytest.raises(AgentError, match="this device's secure_aggregation"):
            agent.join(orchard.terms, SERVER, orchard.registration("a", agent.identity(orchard.terms)))
    with pytest.raises(AgentError, match="needs a federation whose terms"):
        agent.join(orchard.terms.model_copy(update={"distributed": None}), SERVER)
    agent = new_agent(tmp_path / "local", lm, mode="example-local")
    with pytest.raises(AgentError, match="is set to 'example-local'"):
        agent.join(orchard.terms, SERVER, orchard.registration("a", agent.identity(orchard.terms)))


def test_who_is_not_registered_for_these_terms_does_not_join(alone: Agent, orchard: Orchard, tmp_path: Path) -> None:
    """By another registrar, for other terms, for somebody else, or not at all."""
    terms, identity = orchard.terms, alone.identity(orchard.terms)
    other = Orchard(orchard.folder, tmp_path, terms)
    new_registrar(tmp_path)
    later = terms.model_copy(update={"rounds": 3})
    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    for wrong in (
        None, other.registration("a", identity), orchard.registration("a", identity, later),
        orchard.registration("a", stranger), orchard.registration("a", alone.identity(later)),
        orchard.registration("a", identity).model_copy(update={"device": "b"}),
    ):  # fmt: skip
        with pytest.raises(AgentError, match="registrar"):
            alone.join(terms, SERVER, wrong)
    alone.check_terms(terms, orchard.registration("a", identity))
    assert alone.identity(later) != identity and alone.device.membership is None


def test_a_registrar_signs_a_device_once_under_one_name(tmp_path: Path, orchard: Orchard) -> None:
    public = new_registrar(tmp_path / "r")
    terms = changed(orchard.terms, registrar=public)
    one, two = (Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex() for _ in range(2))
    made = register(tmp_path / "r", terms, "a", one)
    assert made.is_of(public, terms.federation) and register(tmp_path / "r", terms, "a", one) == made
    assert not made.is_of(public, orchard.terms.federation) and registered(tmp_path / "r", terms) == {"a": one}
    for name, identity, told in (
        ("a", two, "another identity"), ("b", one, "is a's already"), ("../b", two, "a name of"), ("b", "xy", "a name"),
    ):  # fmt: skip
        with pytest.raises(DeviceError, match=told):
            register(tmp_path / "r", terms, name, identity)
    with pytest.raises(DeviceError, match="another registrar"):
        register(tmp_path / "r", orchard.terms, "b", two)
    with pytest.raises(DeviceError, match="name no registrar"):
        register(tmp_path / "r", orchard.terms.model_copy(update={"distributed": None}), "b", two)
    for folder, told in ((tmp_path / "r", "key already"), (orchard.folder, "protects nobody")):
        with pytest.raises(DeviceError, match=told):
            new_registrar(folder)


def test_the_commands_of_registrar_and_owner(
    tmp_path: Path, orchard: Orchard, alone: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_terms(tmp_path / "terms.toml", orchard.terms)
    shown = CliRunner().invoke(device_app, ["identity", "terms.toml", "--home", str(alone.device.folder.path)])
    assert shown.output.strip() == alone.identity(orchard.terms)
    done = CliRunner().invoke(
        server_app, ["registrar", "sign", str(orchard.registrar), "terms.toml", "a", shown.output.strip()]
    )
    assert done.exit_code == 0, done.output
    assert read_registration(tmp_path / "a.registration") == orchard.registration("a", alone.identity(orchard.terms))
    (tmp_path / "a.registration").write_text("device = 'a'")
    with pytest.raises(DeviceError, match="is no registration"):
        read_registration(tmp_path / "a.registration")
    init = ["init", str(tmp_path / "s"), "--name=orchard", "--host=x"]
    for wrong in (["--survivors=3"], ["--mode=user-distributed", "--devices=4"]):
        assert CliRunner().invoke(server_app, [*init, *wrong]).exit_code == 2
    with pytest.raises(DeviceError, match="looks at each device's release"):
        check_rule(ServerConfig(rule="trimmed-mean"), orchard.terms)
    assert not (tmp_path / "s").exists()


def test_a_servers_terms_have_the_noise_and_the_bits_that_all_devices_reckon(orchard: Orchard) -> None:
    told = orchard.terms.distributed
    assert told and told.noise_multiplier == planned_event(settings_of(orchard.terms)).noise_multiplier
    sums = sum_terms(orchard.terms, layout_of(orchard.terms))
    assert sums and sums.code(1).bits == told.bits and sums.limits == told.limits and sums.masked
    assert sums.code(1).share_std == pytest.approx(told.noise_multiplier * 0.05 / math.sqrt(3))
    assert sums.code(1).rotation != sums.code(2).rotation


# -- one real device among others that are played ---------------------------------------------------------------------


def at_once(seconds: float) -> None:
    """Instead of waiting until an answer may leave."""


@dataclass
class Round:
    """A real device `a` among played ones `b`, `c` and `d`, and whatever a server makes of them."""

    orchard: Orchard
    agent: Agent
    number: int = 1
    peers: dict[str, Session] = field(default_factory=dict)

    def __post_init__(self) -> None:
        terms, operator = self.orchard.terms, (self.orchard.folder / OPERATOR_KEY).read_bytes()
        sums = sum_terms(terms, self.agent.device.context.shared_layout)
        assert sums
        self.operator, self.code = operator, sums.code(self.number)
        self.server = SecureSum(
            (terms.federation, self.number), self.code.width, self.code.bits, sums.limits, sums.registrar
        )
        for name in NAMES[1:]:
            own = Ed25519PrivateKey.generate()
            made = self.orchard.registration(name, own.public_key().public_bytes_raw().hex())
            scene = Scene(terms.federation, self.number, name, sums.registrar, sums.limits)
            self.peers[name] = Session(scene, name.encode() * 32, own, bytes.fromhex(made.certificate))
        self.row = self.agent.device.context.shared_layout.start(0)

    def reopen(self) -> None:
        self.agent = opened(self.agent.device.folder, self.agent)

    def ask(self, kind: str, told: wire.Told, *, number: int | None = None, **plan: Any) -> tuple[dict[str, Any], Any]:
        """Header and arrays of what the real device answers."""
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        at = number or self.number
        arrays = to_record(self.agent.schema.split(self.row.numpy())) if kind == "train" else ArrayRecord()
        content = RecordDict({
            "plan": ConfigRecord({"round": at, "version": at - 1, "head": "", **plan}), "arrays": arrays,
            wire.RECORD: ConfigRecord(dict(told)),
        })  # fmt: skip
        content = sealed(content, kind, self.orchard.terms.name, self.operator)
        reply = answered(Message(content, dst_node_id=1, message_type=kind), self.agent, at_once).content
        found = {n: a.numpy() for n, a in reply.array_records.get("arrays", ArrayRecord()).items()}
        return dict(reply.config_records["header"]), found

    # each of these is a step of an honest server: the real device's answer, and those of the others

    def keys(self) -> dict[str, Any]:
        header, _ = self.ask(wire.KEYS, {})
        self.server.take_advert("a", wire.read_advert(header["advert"]))
        for name, session in self.peers.items():
            self.server.take_advert(name, session.advert)
        self.server.close_keys()
        return header

    @property
    def told_shares(self) -> wire.Told:
        return wire.tell_shares(self.server.names, self.server.adverts_for("a"))

    def shares(self) -> dict[str, Any]:
        header, _ = self.ask(wire.SHARES, self.told_shares)
        self.server.take_shares("a", wire.read_shares_reply(header))
        for name, session in self.peers.items():
            self.server.take_shares(name, session.shares(self.server.names, self.server.adverts_for(name)))
        return header

    @property
    def told_masked(self) -> wire.Told:
        return wire.tell_masked(self.server.members, self.server.inbox("a"))

    def masked(self) -> tuple[dict[str, Any], Any]:
        header, arrays = self.ask("train", self.told_masked)
        if arrays:
            self.server.take_masked("a", wire.read_masked_array(arrays, self.code.width, self.code.bits))
        for name, session in self.peers.items():
            session.receive(self.server.members, self.server.inbox(name))
            self.server.take_masked(name, session.masked(np.full(self.code.width, ord(name)), self.code.bits))
        return header, arrays

    def confirm(self) -> dict[str, Any]:
        header, _ = self.ask(wire.CONFIRM, wire.tell_confirm(sorted(self.server.came)))
        if "signature" in header:
            self.server.take_confirmation("a", wire.read_confirmation(header))
        for name, session in self.peers.items():
            self.server.take_confirmation(name, session.confirm(self.server.came))
        return header

    def unmask(self) -> dict[str, Any]:
        header, _ = self.ask(wire.UNMASK, wire.tell_unmask(self.server.confirmations_for("a")))
        if "of" in header:
            self.server.take_parts("a", wire.read_parts(header))
        for name, session in self.peers.items():
            self.server.take_parts(name, session.unmask(self.server.confirmations_for(name)))
        return header

    @property
    def paid(self) -> list[int]:
        account = self.agent.account
        assert account
        return [entry.round for entry in account.entries]


@pytest.fixture(scope="module")
def resting(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel, orchard: Orchard) -> Agent:
    """A device that has joined, to be copied."""
    return joined(tmp_path_factory.mktemp("rests") / "a", lm, orchard, "a")


@pytest.fixture
def played(resting: Agent, orchard: Orchard, tmp_path: Path) -> Round:
    return Round(orchard, copied(resting, tmp_path / "a"))


def copied(agent: Agent, path: Path) -> Agent:
    """The same device as it is now, in another folder."""
    shutil.copytree(agent.device.folder.path, path)
    return opened(DeviceFolder(path), agent)


def test_a_device_that_is_killed_between_any_two_steps_goes_on(played: Round) -> None:
    """Opened anew before each step, and each step asked twice: the same answers, one payment, the right sum."""
    played.keys()
    played.reopen()
    again, _ = played.ask(wire.KEYS, {})
    assert wire.read_advert(again["advert"]) == played.server.adverts["a"]
    shares = played.shares()
    played.reopen()
    assert played.ask(wire.SHARES, played.told_shares)[0] == shares
    assert played.paid == []
    played.reopen()
    header, arrays = played.masked()
    assert played.paid == [1] and set(arrays) == {"masked"}
    played.reopen()
    once_more = played.ask("train", played.told_masked)
    assert once_more[0] == header and np.array_equal(once_more[1]["masked"], arrays["masked"])
    assert played.ask(wire.KEYS, {})[0] == {"error": "out-of-order"}  # never other masks
    played.reopen()
    signature = played.confirm()
    played.reopen()
    assert played.ask(wire.CONFIRM, wire.tell_confirm(sorted(played.server.came)))[0] == signature
    played.unmask()
    numbers = played.agent.device.state().sent
    assert numbers is not None and played.paid == [1]
    expected = numbers.numpy() + sum(ord(n) for n in NAMES[1:])
    assert np.array_equal(played.server.total(), expected & (2**played.code.bits - 1))
    assert played.agent.device.vault.fact(SESSION, None) is None  # of what is over nothing is kept
    played.reopen()
    for kind, told in ((wire.KEYS, {}), ("train", played.told_masked), (wire.UNMASK, {"from": [], "signatures": []})):
        assert played.ask(kind, told)[0] == {"error": "out-of-order"}  # type: ignore[arg-type]


def test_a_step_of_dialogues_is_paid_by_dialogues_and_has_a_share_of_their_noise(
    lm: LanguageModel, tmp_path: Path
) -> None:
    orchard = planted(tmp_path, mode="example-distributed", clip_norm_l2=1.0)
    played = Round(orchard, joined(tmp_path / "a", lm, orchard, "a"))
    for step in ("keys", "shares", "masked", "confirm", "unmask"):
        getattr(played, step)()
    numbers, (entry,) = played.agent.device.state().sent, played.agent.account.entries if played.agent.account else ()
    assert numbers is not None and played.server.total() is not None
    config = settings_of(orchard.terms)
    assert played.code.decoded(numbers.numpy()).std() == pytest.approx(share_std(config), rel=0.06)
    assert (entry.event, entry.unit, len(entry.dialogues)) == (planned_event(config), "dialogue", len(SAID))


class PowerCut(BaseException):
    """The process is not there any more."""


class Cut:
    """A connection whose process dies before a write."""

    def __init__(self, connection: Any, writes: list[str], limit: int) -> None:
        self.connection, self.writes, self.limit = connection, writes, limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def execute(self, sql: str, *values: Any) -> Any:
        if sql.split()[0] in ("INSERT", "UPDATE", "DELETE", "BEGIN", "COMMIT"):
            if len(self.writes) == self.limit:
                raise PowerCut
            self.writes.append(sql)
        return self.connection.execute(sql, *values)


@contextmanager
def cut_before(limit: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process dies before the write of this number."""
    true, writes = database._encrypted, list[str]()

    @contextmanager
    def opened_to_cut(path: Path, key: str) -> Iterator[Any]:
        with true(path, key) as connection:
            yield Cut(connection, writes, limit)

    with monkeypatch.context() as patch:
        patch.setattr(database, "_encrypted", opened_to_cut)
        yield


def test_a_device_that_is_killed_within_a_step_says_the_same_or_nothing(
    played: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each of its writes in each step; asked again by a server that may choose what: another list, keys, all."""
    first: dict[str, Callable[[], Any]] = {
        "keys": lambda: played.ask(wire.KEYS, {})[0],
        "shares": lambda: played.ask(wire.SHARES, played.told_shares)[0],
        "masked": lambda: played.ask("train", played.told_masked),
        "confirm": lambda: played.ask(wire.CONFIRM, wire.tell_confirm(sorted(played.server.came)))[0],
        "unmask": lambda: played.ask(wire.UNMASK, wire.tell_unmask(played.server.confirmations_for("a")))[0],
    }
    ends = {"masked": 0, "no-release": 0}
    for step, work in first.items():
        before = played.agent
        for limit in range(40):
            played.agent = copied(before, tmp_path / f"{step}-{limit}")
            with cut_before(limit, monkeypatch):
                try:
                    work()
                    break
                except PowerCut:
                    pass
            played.reopen()
            found = work()
            if step == "masked":
                header, arrays = found
                if arrays:  # paid for, once, and never behind other masks
                    ends["masked"] += 1
                    assert played.paid == [1] and played.ask(wire.KEYS, {})[0] == {"error": "out-of-order"}
                    if ends["masked"] == 1:
                        assert np.array_equal(work()[1]["masked"], arrays["masked"])
                else:  # paid for and lost: it stays out, also of a round that begins anew
                    ends["no-release"] += 1
                    assert header == {"error": "no-release"} and played.paid == [1]
                    assert played.agent.device.state().sent is None
            else:
                assert "error" not in found
        assert limit < 39
        played.agent = before
        getattr(played, step)()
    assert ends["masked"] >= 2 and ends["no-release"] >= 1
    assert played.server.total() is not None


Lie = Callable[[Round], tuple[dict[str, Any], Any]]


def _after(*steps: str) -> Callable[[Callable[[Round], Any]], Lie]:
    def made(lie: Callable[[Round], Any]) -> Lie:
        def told(played: Round) -> tuple[dict[str, Any], Any]:
            for step in steps:
                getattr(played, step)()
            found: tuple[dict[str, Any], Any] = lie(played)
            return found

        return told

    return made


def _strange(played: Round, name: str, registrar: bool = False) -> wire.Told:
    """An advert under this name of a device that no registrar, or ours, has signed under another name."""
    own = Ed25519PrivateKey.generate()
    key = private_key((played.orchard.registrar / REGISTRAR_KEY).read_bytes()) if registrar else own
    federation = played.orchard.terms.federation if not registrar else "orchard:other terms"
    signature = certified(key, federation, name, own.public_key().public_bytes_raw())
    scene = played.peers[name].scene
    adverts = {**played.server.adverts, name: Session(scene, b"x" * 32, own, signature).advert}
    return wire.tell_shares(sorted(adverts), adverts)


def _double(played: Round) -> wire.Told:
    """A device that stands there twice, under two names, with keys of its own that it has signed."""
    one = played.peers["b"]
    public = one.identity.public_key().public_bytes_raw().hex()
    made = played.orchard.registration("c", public)
    scene = Scene(one.scene.federation, 1, "c", one.scene.registrar, one.scene.limits)
    other = Session(scene, b"y" * 32, one.identity, bytes.fromhex(made.certificate))
    adverts = {**played.server.adverts, "c": other.advert}
    return wire.tell_shares(sorted(adverts), adverts)


def _fewer(played: Round, *names: str) -> wire.Told:
    return wire.tell_shares(names, {n: played.server.adverts[n] for n in names})


LIES: dict[str, tuple[Lie, str]] = {
    "a plan with fewer survivors": (lambda p: p.ask(wire.KEYS, {}, survivors=2), "bad-message"),
    "keys with something beside them": (lambda p: p.ask(wire.KEYS, {"names": ["a"]}), "bad-message"),
    "a round beyond the terms": (lambda p: p.ask(wire.KEYS, {}, number=3), "not-its-round"),
    "round 0": (lambda p: p.ask(wire.KEYS, {}, round=0), "not-its-round"),
    "shares before keys": (lambda p: p.ask(wire.SHARES, wire.tell_shares([], {})), "out-of-order"),
    "numbers before all": (lambda p: p.ask("train", {"members": [], "from": [], "shares": []}), "out-of-order"),
    "numbers without masks": (_after("keys", "shares")(lambda p: p.ask("train", {})), "bad-message"),
    "numbers of a plan with a noise": (
        _after("keys", "shares")(lambda p: p.ask("train", p.told_masked, noise_multiplier=0.0)), "bad-message",
    ),
    "a sum of two": (_after("keys")(lambda p: p.ask(wire.SHARES, _fewer(p, "a", "b"))), "too-few"),
    "a list without it": (_after("keys")(lambda p: p.ask(wire.SHARES, _fewer(p, "b", "c", "d"))), "not-its-round"),
    "a device twice in a list": (
        _after("keys")(lambda p: p.ask(wire.SHARES, {**p.told_shares, "names": ["a", "b", "b", "c"]})), "not-its-round",
    ),
    "a device under two names": (_after("keys")(lambda p: p.ask(wire.SHARES, _double(p))), "twice-the-same"),
    "a device that nobody registered": (
        _after("keys")(lambda p: p.ask(wire.SHARES, _strange(p, "c"))), "not-registered",
    ),
    "a device that was told other terms": (
        _after("keys")(lambda p: p.ask(wire.SHARES, _strange(p, "c", registrar=True))), "not-registered",
    ),
    "too many": (
        _after("keys")(lambda p: p.ask(wire.SHARES, {**p.told_shares, "names": ["a", "b", "c", "d", "e"]})),
        "not-its-round",
    ),
    "another list after the first": (
        _after("keys", "shares")(lambda p: p.ask(wire.SHARES, _fewer(p, "a", "b", "c"))), "told-two-stories",
    ),
    "parts of too few": (
        _after("keys", "shares")(
            lambda p: p.ask("train", wire.tell_masked(["a", "b"], {"b": p.server.shares["b"]["a"]}))), "too-few",
    ),
    "parts of somebody else": (
        _after("keys", "shares")(
            lambda p: p.ask("train", wire.tell_masked("abcd", dict.fromkeys("bcd", p.server.shares["b"]["a"])))),
        "bad-shares",
    ),
    "a confirmation before numbers": (
        _after("keys", "shares")(lambda p: p.ask(wire.CONFIRM, wire.tell_confirm(NAMES))), "out-of-order",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_gets_a_word_and_nothing_is_paid(played: Round, lie: str) -> None:
    told, code = LIES[lie]
    header, arrays = told(played)
    assert header == {"error": code} and not arrays
    assert played.paid == [] and not played.agent.device.vault.releases() and played.agent.device.state().sent is None


def test_a_device_that_is_alive_is_not_unmasked(played: Round) -> None:
    """Its own mask, or its key with others, never both; and not before enough have confirmed the same."""
    for step in ("keys", "shares", "masked"):
        getattr(played, step)()
    came = sorted(played.server.came)
    assert played.ask(wire.CONFIRM, wire.tell_confirm(["b", "c", "d"]))[0] == {"error": "not-its-round"}  # it has sent
    assert played.ask(wire.CONFIRM, wire.tell_confirm(["a", "b"]))[0] == {"error": "too-few"}
    assert "signature" in played.ask(wire.CONFIRM, wire.tell_confirm(came))[0]
    played.reopen()
    assert played.ask(wire.CONFIRM, wire.tell_confirm(["a", "b", "c"]))[0] == {"error": "told-two-stories"}
    own = played.ask(wire.CONFIRM, wire.tell_confirm(came))[0]["signature"]
    assert played.ask(wire.UNMASK, wire.tell_unmask({"a": own}))[0] == {"error": "not-confirmed"}
    short = {n: s.confirm(["a", *(m for m in "bcd" if m != "b" or n == "b")]) for n, s in played.peers.items()}
    assert played.ask(wire.UNMASK, wire.tell_unmask({"a": own, **{n: short[n] for n in "cd"}}))[0] == {
        "error": "not-confirmed"
    }
    assert played.paid == [1]


def test_other_settings_leaving_and_a_second_chance_give_nothing(played: Round, orchard: Orchard) -> None:
    """A round's numbers leave once, whatever is joined between; a device whose owner changed his mind says nothing."""
    for step in ("keys", "shares", "masked"):
        getattr(played, step)()
    agent, there = played.agent, played.agent.device.membership
    assert there
    agent.leave()
    assert agent.device.vault.fact(SESSION, None) is None
    assert played.ask(wire.CONFIRM, wire.tell_confirm(NAMES))[0] == {"error": "no-device"}
    agent.join(orchard.terms, SERVER, there.registration)
    agent.device.vault.set_fact("pace", 0.25)
    for kind, told in ((wire.KEYS, {}), (wire.CONFIRM, wire.tell_confirm(NAMES)), ("train", played.told_masked)):
        assert played.ask(kind, told)[0] == {"error": "out-of-order"}
    own = agent.device.config.device
    for privacy in ({"mode": "user-local"}, {"epsilon": 1.0}, {"secret": "seed"}):
        changed_own = own.model_copy(update={"privacy": own.privacy.model_copy(update=privacy)})
        agent.device.config = agent.device.config.model_copy(update={"device": changed_own})
        assert played.ask(wire.KEYS, {}, number=2)[0] == {"error": "no-device"} and agent.status()["unprotected"]
    assert played.paid == [1]


# -- a server and real devices ----------------------------------------------------------------------------------------


class Answering(LinkGrid):
    """A deployment's messages, answered by real devices as behind their SuperNodes; some are `gone` from a step on."""

    def __init__(self, link: Link, agents: Mapping[str, Agent], gone: Mapping[str, str]) -> None:
        super().__init__(link)
        self.agents = {link.nodes[name]: agent for name, agent in agents.items()}
        self.names, self.gone = {node: name for name, node in link.nodes.items()}, gone
        self.out: set[int] = set()
        self.asked: list[str] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = list[Message]()
        for message in messages:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            self.asked.append(kind)
            if self.gone.get(self.names[node]) == kind:
                self.out.add(node)
            if node not in self.out:
                replies.append(on_a_wire(answered(message, self.agents[node], at_once)))
        return replies


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel, orchard: Orchard) -> dict[str, Agent]:
    folder = tmp_path_factory.mktemp("four")
    agents = {name: joined(folder / name, lm, orchard, name) for name in NAMES}
    for name, agent in agents.items():
        authority = make_certificates(folder / f"{name}-ca", ["localhost"])
        admit(orchard.folder, name, str(prepare(agent.device.folder.supernode, authority)))
    return agents


def federated(
    orchard: Orchard, folder: Path, agents: Mapping[str, Agent], gone: Mapping[str, str], lines: list[str]
) -> tuple[Any, Answering, np.ndarray, np.ndarray]:
    shutil.copytree(orchard.folder, folder)
    link = Link()
    link.set_admitted(admitted(folder))
    for node in link.nodes.values():
        link.state.activate_node(node, 600.0)
    strategy, start = strategy_of(folder, link, layout_of(orchard.terms), lines.append)
    grid = Answering(link, agents, gone)
    begun = np.concatenate([array.numpy().ravel() for array in start.values()])
    try:
        return strategy, grid, federate(grid, strategy, Recorder(), start, 1).numpy(), begun
    except NoReleaseError as error:
        lines.append(str(error))
        return strategy, grid, begun, begun


def test_four_devices_of_which_one_is_lost_after_it_learned_give_the_sum_of_three_with_its_noise(
    four: Mapping[str, Agent], orchard: Orchard, tmp_path: Path
) -> None:
    """What arrives is the sum of what three quantised, to the bit, and its noise is what ε = 8 asks of one server."""
    agents = {name: copied(agent, tmp_path / name) for name, agent in four.items()}
    strategy, _, shared, begun = federated(orchard, tmp_path / "server", agents, {"d": "train"}, [])
    assert (strategy.facts[1].releases, strategy.facts[1].silent, strategy.facts[1].refused) == (3, 1, {})
    sums, numbers = sum_terms(orchard.terms, layout_of(orchard.terms)), [agents[n].device.state().sent for n in "abc"]
    assert sums and orchard.terms.distributed
    assert {a.device.context.sum_code(1) for a in agents.values()} == {sums.code(1)}  # turned and scaled alike
    row = sums.code(1).decoded(sum(n.numpy() for n in numbers if n is not None))
    assert np.array_equal(shared, begun + (row / 3).astype(np.float32))
    together = orchard.terms.distributed.noise_multiplier * 0.05
    assert float(row.std()) == pytest.approx(together, rel=0.05)
    share = share_std(settings_of(orchard.terms))
    for found in numbers:
        assert found is not None and sums.code(1).decoded(found.numpy()).std() == pytest.approx(share, rel=0.06)
    for name, agent in agents.items():
        entries = agent.account.entries if agent.account else []
        assert [e.event.noise_multiplier for e in entries] == ([together / 0.05] if name != "d" else [])
        assert len(agent.device.vault.releases()) == len(entries)


@pytest.mark.parametrize(
    ("step", "refused", "times"),
    [(wire.SHARES, "too-few", 3), ("train", "too-few", 1), (wire.CONFIRM, "not-confirmed", 1)],
)
def test_a_round_that_too_few_come_through_ends_without_a_sum_and_says_so(
    four: Mapping[str, Agent], orchard: Orchard, tmp_path: Path, step: str, refused: str, times: int
) -> None:
    """Two of four are lost. It is tried again while nobody was asked for numbers, and never after it."""
    agents = {name: copied(agent, tmp_path / name) for name, agent in four.items()}
    lines = list[str]()
    strategy, grid, shared, begun = federated(orchard, tmp_path / "server", agents, {"c": step, "d": step}, lines)
    assert np.array_equal(shared, begun) and grid.asked.count(wire.KEYS) == 4 * times
    facts = strategy.facts[1]
    assert facts.releases == 0 and facts.silent == 2 and set(facts.refused) == {refused}
    assert "not aggregated: 0 releases of the 3 that it needs" in came_to(facts, strategy.fewest)
    assert lines[-1] == "no round came to a sum of 3 devices or more"
    assert sum("once more" in line for line in lines) == times - 1
    for name, agent in agents.items():
        paid = len(agent.account.entries) if agent.account else 0
        assert paid == (step != wire.SHARES and (name in "ab" or step == wire.CONFIRM))


def test_a_sum_is_not_of_more_than_the_terms_say(orchard: Orchard) -> None:
    link = Link()
    strategy, _ = strategy_of(orchard.folder, link, layout_of(orchard.terms), print)
    strategy.names = [f"n{k}" for k in range(9)]
    assert len(strategy.sampled(1)) == 4 and strategy.sampled(1) == strategy.sampled(1)
    assert len({tuple(strategy.sampled(n)) for n in range(1, 5)}) > 1
