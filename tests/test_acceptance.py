"""What a device accepts of a federation: modes that protect it, and terms that it can bear."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from florilegium.client.agent import acceptance
from florilegium.client.agent.agent import Agent
from florilegium.client.agent.config import new_config
from florilegium.client.agent.device import Device
from florilegium.client.agent.errors import AgentError, DeviceError
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.supernode import answered, prepare
from florilegium.client.agent.terms import LARGEST_FILE, Terms, read_terms, write_terms
from florilegium.client.calibration import release_noise
from florilegium.client.flower_arrays import on_a_wire
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.places import base_hash
from florilegium.privacy import accounting
from florilegium.privacy.accounting import Event, calibrate, epsilon
from florilegium.privacy.common.errors import UserError
from florilegium.privacy.modes import Mode
from florilegium.privacy.plan import RoundPlan
from florilegium.server.config import ServerConfig
from florilegium.simulation.deployment.certificates import (
    CA,
    CERTIFICATE,
    KEY,
    OPERATOR_KEY,
    SETTINGS,
    TERMS,
    make_certificates,
)
from florilegium.simulation.deployment.link import Link, LinkGrid
from florilegium.simulation.deployment.register import admit, admitted
from florilegium.simulation.deployment.rounds import OperatorStrategy, layout_of, make_folder, serving, strategy_of
from florilegium.simulation.rounds import Recorder, federate
from florilegium.simulation.runs.folder import RunFolder

SERVER = "127.0.0.1:9092"
SAID = (("Do you like apples?", "Only the green ones."), ("What shall we cook?", "Pumpkin soup."), ("And?", "Nothing."))


def made(home: DeviceFolder, lm: LanguageModel, **privacy: object) -> Agent:
    """A new device with both consents and a few dialogues, with these settings of its privacy."""
    config = new_config(ModelConfig(name="nano")).model_copy(update={"port": 0})
    agent = Agent(Device(home, config, lm, home.make(config)))
    agent.consent("learn", True)
    agent.consent("federate", True)
    for prompt, wanted in SAID:
        agent.rate(agent.device.vault.add(prompt, "hm", "").id, False, wanted)
    set_privacy(agent, **privacy)
    return agent


def set_privacy(agent: Agent, **privacy: object) -> None:
    device = agent.device.config.device
    changed = device.privacy.model_copy(update=privacy)
    agent.device.config = agent.device.config.model_copy(
        update={"device": device.model_copy(update={"privacy": changed})}
    )


def terms(**changes: Any) -> Terms:
    """The usual ones; sections are given in part."""
    usual = {"name": "orchard", "rounds": 3, "seed": 1, "base": base_hash("nano"), "operator": "ab" * 32}
    return Terms.model_validate({**usual, **changes})


@pytest.fixture
def home(tmp_path: Path) -> DeviceFolder:
    return DeviceFolder(tmp_path / "device")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel) -> Agent:
    """One that never joins anything."""
    return made(DeviceFolder(tmp_path_factory.mktemp("home") / "device"), lm)


# -- modes ------------------------------------------------------------------------------------------------------------


class Answering(LinkGrid):
    """A deployment's messages, answered by real agents as behind their SuperNodes; keeps the releases that arrive."""

    def __init__(self, link: Link, agents: Mapping[str, Agent]) -> None:
        super().__init__(link)
        self.agents = {link.nodes[name]: agent for name, agent in agents.items()}
        self.arrived: list[np.ndarray] = []  # (P,) each, in the order of rounds and devices

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._answered(m) for m in messages]

    def _answered(self, message: Message) -> Message:
        reply = on_a_wire(answered(message, self.agents[message.metadata.dst_node_id], lambda seconds: None))
        if arrays := reply.content.array_records.get("arrays"):
            self.arrived.append(np.concatenate([array.numpy().ravel() for array in arrays.values()]))
        return reply


def serving_agents(folder: Path, told: Terms, agents: Mapping[str, Agent]) -> tuple[OperatorStrategy, Any, Answering]:
    """What `server start` makes of the folder, what devices are sent first, and a grid where all of them are there."""
    for name, agent in agents.items():
        authority = make_certificates(folder / name, ["localhost"])
        admit(folder, name, str(prepare(agent.device.folder.supernode, authority)))
    link = Link()
    link.set_admitted(admitted(folder))
    for node in link.nodes.values():
        link.state.activate_node(node, 600.0)
    return *strategy_of(folder, link, layout_of(told), lambda line: None), Answering(link, agents)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_what_a_server_receives_of_each_mode_has_the_noise_that_was_claimed_or_nothing_arrives(
    lm: LanguageModel, tmp_path: Path, mode: Mode
) -> None:
    """Two real devices answer two rounds of the server of a deployment, which adds no noise of its own.

    Three dialogues or a clipped change are far below the noise: what arrives has its variance, in every array.
    """
    noisy = mode in ("example-local", "user-local")
    agents = {name: made(DeviceFolder(tmp_path / "home" / name), lm) for name in ("a", "b")}
    settings: dict[str, Any] = {"mode": mode} if noisy else {}
    told = make_folder(tmp_path, terms(rounds=2, min_devices=2), ServerConfig(), 8.0, **settings)
    for agent in agents.values():
        set_privacy(agent, **settings)
        agent.join(told, SERVER)
        set_privacy(agent, mode=mode)
    strategy, start, grid = serving_agents(tmp_path, told, agents)
    shared = federate(grid, strategy, Recorder(), start, 2).numpy()
    begun = np.concatenate([array.numpy().ravel() for array in start.values()])
    if not noisy:
        assert not grid.arrived and np.array_equal(shared, begun)
        assert strategy.facts[1].refused == strategy.facts[2].refused == {"no-device": 2}
        for agent in agents.values():
            assert agent.account and not agent.account.entries and not agent.device.vault.sent()
            agent.leave()
            with pytest.raises(AgentError, match=mode):
                agent.join(told, SERVER)
        return
    claimed = release_noise(agents["a"].device.context.config, 1, 0).on_device
    arrived = np.stack(grid.arrived)  # (rounds × devices, P)
    assert len(arrived) == 4 and strategy.noise.on_sum == 0 < claimed
    assert shared - begun == pytest.approx(arrived.sum(0) / 2, abs=1e-5)  # as they came, and nothing else
    drawn = arrived.reshape(4, len(start), -1) / claimed
    assert drawn.std(2) == pytest.approx(1, abs=0.12)  # 768 numbers each: four times 1 / √(2 · 768) and a little more
    assert drawn[..., ::2].std() == pytest.approx(1, abs=0.04) == drawn[..., 1::2].std()
    assert np.abs(np.corrcoef(arrived) - np.eye(4)).max() < 0.1  # drawn anew, each time and by each


def test_a_release_that_its_server_would_refuse_is_neither_paid_for_nor_sent(
    home: DeviceFolder, lm: LanguageModel
) -> None:
    """In `user-local` there is more noise than the terms of `example-local` have room for."""
    agent = made(home, lm, mode="user-local")
    (home.path.parent / "server").mkdir()
    told = make_folder(home.path.parent / "server", terms(), ServerConfig(), 8.0)
    with pytest.raises(AgentError, match=r"refuses releases longer than .* of another --mode"):
        agent.join(told, SERVER)
    set_privacy(agent, mode="example-local")
    agent.join(told, SERVER)
    set_privacy(agent, mode="user-local")
    row = agent.device.context.shared_layout.start(0)
    for _ in range(2):
        assert agent.contribute([agent.device.config.name], row, RoundPlan(1, 0)) == [None]
    assert agent.account and not agent.account.entries
    assert [(s.round, s.kind, s.bytes) for s in agent.device.vault.sent()] == [(1, "too-large", 0)]
    set_privacy(agent, mode="example-local")
    assert agent.contribute([agent.device.config.name], row, RoundPlan(1, 0)) != [None]


def test_secrets_that_can_be_repeated_join_no_federation(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm, secret="seed")
    with pytest.raises(AgentError, match=r"privacy\.secret = 'os'"):
        agent.join(terms(), SERVER)
    set_privacy(agent, secret="os")
    agent.join(terms(), SERVER)
    set_privacy(agent, secret="seed")  # changed afterwards
    assert not agent.device.federating and "simulations" in agent.status()["unprotected"]
    row = agent.device.context.shared_layout.start(0)
    assert agent.contribute([agent.device.config.name], row, RoundPlan(1, 0)) == [None]
    assert agent.account and not agent.account.entries


def test_under_later_terms_new_dialogues_alone_take_part(home: DeviceFolder, lm: LanguageModel) -> None:
    """Five rounds need more noise than three: what was released under one σ is not drawn under another."""
    agent = made(home, lm)
    agent.join(terms(), SERVER)
    row, plan, name = agent.device.context.shared_layout.start(0), RoundPlan(1, 0), agent.device.config.name
    assert agent.contribute([name], row, plan) != [None]
    agent.leave()
    agent.join(terms(name="meadow", rounds=5), SERVER)
    assert agent.contribute([name], row, plan) == [None] and agent.device.vault.sent()[-1].kind == "other-terms"
    new = agent.device.vault.add("Something new?", "hm", "").id
    agent.rate(new, False, "The swallows are back.")
    assert agent.contribute([name], row, plan) != [None]  # the refused question has used nothing up
    assert [i for i, _ in agent.device.state().pool.slots] == [new]
    assert agent.account and [len(e.dialogues) for e in agent.account.entries] == [3, 1]


# -- terms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shared": {"pool_capacity": 10**7}}, "pool_capacity = 1e.07, above 4096"),
        ({"shared": {"sampling_rate": 1e-6}}, "sampling_rate = 1e-06, below 0.001"),
        ({"shared": {"steps_per_round": 10**6}}, "steps_per_round = 1e.06, above 1000"),
        ({"shared": {"learning_rate": 1e300}}, "learning_rate = 1e.300, above 1000"),
        ({"shared": {"adapter": {"alpha": 1e30}}}, "alpha = 1e.30, above 4096"),
        ({"shared": {"adapter": {"rank": 257}}}, "rank = 257, above 256"),
        ({"shared": {"adapter": {"targets": ["x" * 1000]}}}, "128 characters"),
        ({"shared": {"steps_per_round": 1000}, "rounds": 1000}, "1,000 rounds of 1,000 steps"),
        ({"shared": {"pool_capacity": 4096, "adapter": {"targets": [], "rank": 64, "factors": "both"}}}, "GiB"),
        ({"shared": {"pool_capacity": 4096, "steps_per_round": 100, "synthetic": 3}}, "texts learned from in a round"),
    ],
)
def test_terms_that_cost_too_much_are_refused(device: Agent, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(AgentError, match=told):
        device.join(terms(**changes), SERVER)
    assert device.device.membership is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shared": {"sampling_rate": 1e-6}}, "sampling_rate = 1e-06, below 0.001"),
        ({"shared": {"steps_per_round": 1000}, "rounds": 1000}, "1,000 rounds of 1,000 steps"),
        ({"shared": {"pool_capacity": 0}}, "leaves nothing to train"),
        ({"shared": {"steps_per_round": 1000, "batch_size": 512}}, "texts learned from in a round"),
    ],
)
def test_a_server_is_not_made_nor_started_for_terms_that_no_device_takes(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        make_folder(tmp_path, terms(**changes), ServerConfig(), 8.0, ["localhost"])
    assert not list(tmp_path.iterdir())
    layout = layout_of(terms())
    for name in (OPERATOR_KEY, SETTINGS, CA, CERTIFICATE, KEY):
        (tmp_path / name).touch()
    write_terms(tmp_path / TERMS, terms(**changes))  # edited afterwards
    with pytest.raises(UserError, match=told), serving(tmp_path, "127.0.0.1", 0, layout, print):
        pass


def test_a_federation_that_has_begun_goes_on_under_terms_that_nobody_would_take_now(tmp_path: Path) -> None:
    make_folder(tmp_path, terms(), ServerConfig(), 8.0, ["localhost"])
    layout, lines = layout_of(terms()), list[str]()
    write_terms(tmp_path / TERMS, terms(shared={"sampling_rate": 1e-6}))
    for number, begun in ((0, False), (1, True)):
        RunFolder(tmp_path).save_shared(number, {"row": np.zeros(1)}, {}, {})
        if begun:
            with serving(tmp_path, "127.0.0.1", 0, layout, lines.append) as link:
                assert not link.online()
        else:
            with pytest.raises(UserError, match="below"), serving(tmp_path, "127.0.0.1", 0, layout, lines.append):
                pass
    [line] = lines
    assert "no device would join for these terms now" in line and "sampling_rate = 1e-06" in line


def test_what_one_mode_alone_bears_is_left_to_the_devices(device: Agent, lm: LanguageModel) -> None:
    """Gradients of each of 4,096 dialogues are too many; a device whose whole change is clipped has none of them."""
    wide = terms(shared={"pool_capacity": 4096, "adapter": {"targets": [], "rank": 64, "factors": "both"}})
    layout = lm.lora_layout(wide.shared.adapter, public_seed=1)
    acceptance.check_for_everyone(layout, wide.shared, wide.rounds)
    with pytest.raises(AgentError, match="GiB"):
        device.check_terms(wide)


def test_a_promise_that_protects_nothing_is_refused(device: Agent) -> None:
    before = device.device.config
    try:
        set_privacy(device, delta=0.02)
        with pytest.raises(AgentError, match="must be below 1/64, as there are 64 dialogues"):
            device.check_terms(terms())
        set_privacy(device, delta=1e-3)
        few = {"pool_capacity": 512, "sampling_rate": 1e-3, "steps_per_round": 1}
        with pytest.raises(AgentError, match=r"chance below delta = 0\.001"):
            device.check_terms(terms(rounds=1, shared=few))
        set_privacy(device, delta=1e-5)
        with pytest.raises(AgentError, match=r"noise of less than 0\.3"):
            device.check_terms(terms(rounds=1, shared=few))
        set_privacy(device, delta=1e-5, mode="user-local", epsilon=1e-6)
        with pytest.raises(AgentError, match="epsilon = 1e-06 cannot be reached"):
            device.check_terms(terms())
        set_privacy(device, delta=0.1, mode="user-local", epsilon=8.0)
        with pytest.raises(AgentError, match="must be below 1/10, as there are 10 devices"):
            device.check_terms(terms(min_devices=10))
    finally:
        device.device.config = before


def test_memory_that_is_not_there_is_a_refusal(device: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(acceptance, "planned_event", full)
    with pytest.raises(AgentError, match="more memory than this device has"):
        device.check_terms(terms())


def numbers(field: str) -> st.SearchStrategy[Any]:
    """What the schema admits there, the ends of it often."""
    whole = {
        "pool_capacity": (0, 2**62), "steps_per_round": (1, 2**62), "batch_size": (1, 2**62), "synthetic": (0, 16),
    }  # fmt: skip
    if field in whole:
        low, high = whole[field]
        return st.integers(low, high) | st.integers(low, min(high, 4096)) | st.sampled_from([low, 1, 64, 1000])
    top = 1.0 if field == "sampling_rate" else 1e300
    usual = st.sampled_from([1e-3, 0.01, 0.5, 1.0])
    return st.floats(1e-300, top, allow_nan=False) | usual


FIELDS = ("pool_capacity", "sampling_rate", "steps_per_round", "batch_size", "synthetic", "learning_rate", "proximal")
ADAPTERS = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.integers(1, 2**62) | st.integers(1, 300),
        "alpha": st.floats(1e-300, 1e300),
        "factors": st.sampled_from(["a", "b", "both", "alternate"]),
        "targets": st.sampled_from([[], ["v_proj"], ["no_such"], ["x" * 5000], ["v_proj"] * 500]),
    },
)
SHARED = st.fixed_dictionaries({}, optional={**{f: numbers(f) for f in FIELDS}, "adapter": ADAPTERS})
PRIVACY = st.fixed_dictionaries(
    {"mode": st.sampled_from(["example-local", "user-local"])},
    optional={"epsilon": st.sampled_from([1e-3, 1.0, 8.0, 100.0]), "delta": st.sampled_from([1e-30, 1e-9, 1e-5, 0.5])},
)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.integers(1, 10_000), shared=SHARED, privacy=PRIVACY)
@example(rounds=100, shared={"steps_per_round": 1000, "sampling_rate": 1e-3}, privacy={"mode": "example-local"})
@example(rounds=100, shared={"steps_per_round": 1000, "sampling_rate": 1.0}, privacy={"mode": "example-local"})
@example(rounds=1, shared={"sampling_rate": 3.4e-6}, privacy={"mode": "example-local"})
@example(rounds=1, shared={"proximal": 2.0}, privacy={"mode": "example-local"})
def test_whatever_terms_say_is_accepted_or_refused_at_a_bounded_cost(
    device: Agent, rounds: int, shared: dict[str, Any], privacy: dict[str, Any]
) -> None:
    """So many sums over so many points at most: less than two seconds and 1 GB, by far."""
    before, asked = device.device.config, list[tuple[Event, ...]]()
    try:
        told = terms(rounds=rounds, shared=shared)
    except ValidationError:  # of which no terms can be made
        reject()
    reckon = accounting._accountant.__wrapped__

    def counted(events: tuple[Event, ...], adjacency: Any) -> Any:
        asked.append(events)
        found = reckon(events, adjacency)
        assert max(p.size for p in (found._pld._pmf_remove, found._pld._pmf_add)) <= 2 * accounting.POINTS
        return found

    set_privacy(device, **privacy)
    accounting.calibrate.cache_clear()
    accounting._epsilon.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accounting, "_accountant", counted)
            device.check_terms(told)
    except AgentError as error:
        assert str(error) and "\n" not in str(error)
    finally:
        device.device.config = before
    assert len(asked) <= 25


@pytest.mark.parametrize("steps", [1, 7, 999])
def test_planning_ends_where_chance_alone_would_keep_the_promise(steps: int) -> None:
    with pytest.raises(accounting.BudgetError, match="no noise would be added"):
        calibrate(8.0, 1e-2, 1e-2 / steps, steps)
    rate = 1.0001e-2 / steps  # hardly more than chance
    sigma = calibrate(100.0, 1e-2, rate, steps)
    assert 0 < sigma < 0.2 and epsilon([Event(sigma, rate, steps)], 1e-2) <= 100.0


@pytest.mark.parametrize("event", [Event(0.5, 1.0, 50_000), Event(0.04, 0.5, 3), Event(0.6, 0.01, 10_000)])
def test_a_coarser_grid_reports_no_less(event: Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of a quarter of the points, and Gaussian differential privacy where all of it is known."""
    fine = epsilon([event], 1e-5)
    accounting._epsilon.cache_clear()
    accounting._accountant.cache_clear()
    monkeypatch.setattr(accounting, "STEP_POINTS", accounting.STEP_POINTS // 64)
    monkeypatch.setattr(accounting, "POINTS", accounting.POINTS // 64)
    coarse = epsilon([event], 1e-5)
    accounting._epsilon.cache_clear()
    accounting._accountant.cache_clear()
    assert fine <= coarse <= 1.2 * fine
    if event.sampling_rate == 1:
        mu = 2 / event.noise_multiplier * math.sqrt(event.steps)
        assert fine >= mu**2 / 2 - mu * 4.2649  # of N(μ²/2, μ²) all but 1e-5 is above


def test_names_in_terms_load_nothing(device: Agent, tmp_path: Path) -> None:
    (tmp_path / "florist.py").write_text("raise SystemExit('was run')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        before = set(sys.modules)
        device.check_terms(terms(model="florist"))
        for name in ("florist", "florist.Net", "florist:Net", str(tmp_path / "florist.py")):
            with pytest.raises(AgentError):
                device.check_terms(terms(model=name, base="0" * 64, shared={"adapter": {"targets": [name]}}))
    assert set(sys.modules) == before


def test_a_file_of_terms_is_read_no_further_than_terms_go(tmp_path: Path) -> None:
    path = tmp_path / "terms.toml"
    write_terms(path, terms())
    assert read_terms(path) == terms()
    path.write_text(f"# {'x' * LARGEST_FILE}\n" + path.read_text())
    with pytest.raises(DeviceError, match="longer than 65,536 bytes"):
        read_terms(path)
    with pytest.raises(DeviceError, match="longer than 65,536 bytes"):
        read_terms(Path("/dev/zero"))


def test_usual_plans_are_reckoned_on_the_fine_grid() -> None:
    for event in (Event(0.978515625, 0.5, 3), Event(0.8, 0.5, 3), Event(4.0, 0.5, 100), Event(1.0, 0.01, 1000)):
        assert accounting.interval([event], "replace-one") == accounting.DISCRETIZATION
