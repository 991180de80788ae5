"""The server's rounds over a grid of devices whose releases are known: what it makes of them, by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity  # private: a message cannot be made outside a run without it

from florilegium.client.agent.signature import new_key
from florilegium.client.agent.terms import Terms
from florilegium.client.flower_replies import refusal
from florilegium.privacy.noise import ReleaseNoise
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import PROTOCOL, Array, Release, Schema
from florilegium.privacy.reply_gate import FAILED
from florilegium.server.config import ServerConfig
from florilegium.server.fedbuff import BufferedStrategy
from florilegium.server.release_collector import (
    Limits,
    ReleaseCollector,
    RoundFacts,
    signal_to_noise,
    to_arrays,
    to_numpy,
)
from florilegium.server.strategy import NoReleaseError, ReleaseStrategy
from florilegium.simulation.config import load_config
from florilegium.simulation.deployment.rounds import OperatorStrategy
from florilegium.simulation.engines.cohort_grid import CohortGrid
from florilegium.simulation.engines.workers import Cohort, Done, Job
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.settings import ConfigError, config_folder

SCHEMA = Schema((("q.lora_A", (4, 3)), ("q.lora_B", (2, 4))))
WIDTH, HEAD = 20, "0" * 64
Row = np.ndarray[Any, np.dtype[np.float32]]


@dataclass
class Scripted:
    """Devices that send what they are told to: a row, or None for no release."""

    rows: Mapping[str, Row | None]
    ranks: Mapping[str, int] = field(default_factory=dict)
    asked: list[tuple[str, int, Row]] = field(default_factory=list)  # device, version, what it received

    @property
    def schema(self) -> Schema:
        return SCHEMA

    @property
    def sessions(self) -> None:
        return None

    def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Release | None]:
        self.asked += [(name, plan.version, received.numpy().copy()) for name in names]
        return [self._release(name, plan) for name in names]

    def _release(self, name: str, plan: RoundPlan) -> Release | None:
        row, rank = self.rows[name], self.ranks.get(name, 0)
        schema = SCHEMA.of_round(plan.round, rank)
        if row is None:
            return None
        return Release.of(row[SCHEMA.places(plan.round, rank)], plan.version, HEAD, schema)

    def adopt(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> None:
        pass


def grid_of(
    devices: Scripted, names: Sequence[str], silent: Sequence[str] = (), failing: Sequence[str] = ()
) -> CohortGrid:
    def spread(job: Job, asked: Sequence[str], question: Any) -> Iterator[Done]:
        here = tuple(n for n in asked if n not in (*silent, *failing))
        yield Cohort(here), job(devices, here, question) if here else []
        yield Cohort(tuple(failing)), [(name, refusal(FAILED)) for name in failing]

    return CohortGrid(spread, SCHEMA, names)


def start(row: Row | None = None) -> ArrayRecord:
    return to_arrays(SCHEMA.split(np.zeros(WIDTH, np.float32) if row is None else row))


def row_of(arrays: ArrayRecord) -> Array:
    return SCHEMA.join(to_numpy(arrays))


def strategy(config: ServerConfig, noise: ReleaseNoise | None = None) -> ReleaseStrategy:
    return ReleaseStrategy(config, SCHEMA, 0, noise or ReleaseNoise(), limits=Limits(1e3))


def drawn(seed: int, count: int, std: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, std, size=(count, WIDTH)).astype(np.float32)


def test_a_stale_release_is_made_on_what_was_sent_then_and_counts_less() -> None:
    """Buffers of two: b's second release begins from version 0 and ends in version 2, where it weighs 1 / √2."""
    a, b, c = drawn(0, 3)
    makers = {1: {"a": 0, "b": 0}, 2: {"c": 0, "a": 1}}
    versions: dict[int, ArrayRecord] = {0: start()}
    devices = Scripted({"a": a, "b": b, "c": c})
    buffered = BufferedStrategy(
        ServerConfig(buffer=2, concurrency=2), SCHEMA, 0, ReleaseNoise(), limits=Limits(1e3),
        makers=makers.__getitem__, version=versions.__getitem__,
    )  # fmt: skip
    found = buffered.start(
        grid_of(devices, ["a", "b", "c"]), start(), 2, evaluate_fn=lambda n, arrays: versions.update({n: arrays})
    )
    first = (a + b) / 2
    np.testing.assert_allclose(row_of(versions[1]), first, atol=1e-6)
    np.testing.assert_allclose(row_of(found.arrays), first + (a + c / np.sqrt(2)) / 2, atol=1e-6)
    begun = [(name, version) for name, version, _ in devices.asked]
    assert begun == [("a", 0), ("b", 0), ("c", 0), ("a", 1)]
    assert not devices.asked[2][2].any() and np.allclose(devices.asked[3][2], first, atol=1e-6)


def test_other_devices_are_asked_in_each_round_and_everybody_comes_up() -> None:
    """Three of ten: in 40 rounds one is never asked with probability 0.7⁴⁰ = 6e-7."""
    server = strategy(ServerConfig(sampled_share=0.3))
    server.names = [f"d{k}" for k in range(10)]
    asked = [server.sampled(number) for number in range(1, 41)]
    assert all(len(set(names)) == 3 and names == sorted(names) for names in asked)
    assert len({tuple(names) for names in asked}) > 20 and {n for names in asked for n in names} == set(server.names)
    assert asked[0] == server.sampled(1)
    other = ReleaseStrategy(ServerConfig(sampled_share=0.3), SCHEMA, 1, ReleaseNoise())
    other.names = server.names
    assert [other.sampled(number) for number in range(1, 9)] != asked[:8]


def test_devices_go_on_from_the_last_round_and_are_told_the_head_that_they_sent() -> None:
    """Releases of 1 in both rounds, momentum ½: 1, then 1 + (½ + 1)."""
    ones = np.ones(WIDTH, np.float32)
    told: list[dict[str, str]] = []

    class Hearing(Scripted):
        def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Release | None]:
            told.append(dict(plan.heads))
            return super().contribute(names, received, plan)

    devices = Hearing({"a": ones, "b": ones})
    server = strategy(ServerConfig(optimizer="fedavgm", momentum=0.5))
    found = server.start(grid_of(devices, ["a", "b"]), start(), 2)
    np.testing.assert_allclose(row_of(found.arrays), 2.5, atol=1e-6)
    assert [(name, version, float(row[0])) for name, version, row in devices.asked] == [
        ("a", 0, 0.0), ("b", 0, 0.0), ("a", 1, 1.0), ("b", 1, 1.0),
    ]  # fmt: skip
    assert told == [{"a": "", "b": ""}, {"a": HEAD, "b": HEAD}]
    np.testing.assert_allclose(server.moments.first, 1.5)


@pytest.mark.parametrize("products", ["stack", "residual"])
def test_products_of_every_round_are_added_to_the_weight(products: Literal["stack", "residual"]) -> None:
    """A = 1 and B = 0 received, rank 4; two devices send B = ±1 with A = 1 ± 1, in each of two rounds.

    Their products are 4 · 2 and 0, so that the mean of products is 4, and that of the means, 4 · 1 · 0, is 0: FLoRA
    and FedEx both add 4 in a round.
    """
    names, whole = ["a", "b"], SCHEMA.with_weights()
    up = SCHEMA.join({"q.lora_A": np.ones((4, 3), np.float32), "q.lora_B": np.ones((2, 4), np.float32)})
    began = SCHEMA.join({"q.lora_A": np.ones((4, 3), np.float32), "q.lora_B": np.zeros((2, 4), np.float32)})
    devices = Scripted({"a": up, "b": -up})
    weights = []
    for rounds in (1, 2):
        server = strategy(ServerConfig(products=products))
        arrays = to_numpy(server.start(grid_of(devices, names), server.begin(began), rounds).arrays)
        weights.append(arrays["q.weight"])
        np.testing.assert_allclose(SCHEMA.join({n: arrays[n] for n, _ in SCHEMA.shapes}), began, atol=1e-6)
    assert weights[0].shape == (2, 3) and whole.width == WIDTH + 6
    np.testing.assert_allclose(weights[0], 4, atol=1e-5)
    np.testing.assert_allclose(weights[1], 8, atol=1e-5)


def test_with_stacked_products_devices_begin_anew_in_every_round() -> None:
    """B = 1 learned in each of two rounds, on A = 1 of rank 4: 4 and 4 in the weight, and the factors as they began."""
    began = SCHEMA.join({"q.lora_A": np.ones((4, 3), np.float32), "q.lora_B": np.zeros((2, 4), np.float32)})
    learned = SCHEMA.join({"q.lora_A": np.zeros((4, 3), np.float32), "q.lora_B": np.ones((2, 4), np.float32)})
    server, devices = strategy(ServerConfig(products="stack")), Scripted({"a": learned})
    arrays = to_numpy(server.start(grid_of(devices, ["a"]), server.begin(began), 2).arrays)
    np.testing.assert_allclose(arrays["q.weight"], 8, atol=1e-5)
    np.testing.assert_allclose(SCHEMA.join({n: arrays[n] for n, _ in SCHEMA.shapes}), began)
    whole = SCHEMA.with_weights()
    (first, second) = (whole.split(row) for _, _, row in devices.asked)
    assert not first["q.weight"].any() and np.allclose(second["q.weight"], 4)


@pytest.mark.parametrize("ranks", [{}, {"d3": 2}])
def test_of_noise_alone_there_is_no_signal_whatever_the_ranks(ranks: dict[str, int]) -> None:
    names, squares = [f"d{k}" for k in range(4)], []
    senders = 3.0 + (SCHEMA.places(1, 2) if ranks else np.ones(WIDTH))
    noise = ReleaseNoise(on_device=0.5)
    for seed in range(200):
        rows = drawn(seed, 4, std=0.5)
        for name, rank in ranks.items():
            rows[names.index(name)][~SCHEMA.places(1, rank)] = 0
        server = strategy(ServerConfig(), noise)
        server.start(grid_of(Scripted(dict(zip(names, rows, strict=True)), ranks), names), start(), 1)
        norm = server.facts[1].change_norm_l2
        squares.append(norm**2)
        assert server.facts[1].signal_to_noise == pytest.approx(signal_to_noise(norm, noise.of_mean(senders), WIDTH))
    assert np.mean(squares) == pytest.approx(WIDTH * noise.of_mean(senders) ** 2, rel=0.1)


def test_a_round_in_which_one_fails_and_the_others_are_silent_changes_nothing() -> None:
    devices = Scripted({"b": None})
    server = strategy(ServerConfig())
    found = server.start(grid_of(devices, ["a", "b"], silent=["b"], failing=["a"]), start(drawn(0, 1)[0]), 1)
    assert np.array_equal(row_of(found.arrays), drawn(0, 1)[0])
    assert (server.facts[1].releases, server.facts[1].silent, server.facts[1].refused) == (0, 1, {"failed": 1})
    with pytest.raises(NoReleaseError, match="failed"):
        strategy(ServerConfig()).start(grid_of(devices, ["a"], failing=["a"]), start(), 1)


def test_what_is_no_answer_of_the_form_is_counted_and_ends_nothing() -> None:
    """Whoever was admitted can send any records: none, others under these names, or errors."""
    of_config, of_arrays = ConfigRecord({"adopted": 1}), ArrayRecord()
    contents = [{}, {"header": of_arrays}, {"arrays": of_config}, {"header": ConfigRecord({"error": "failed"})}]
    head = ConfigRecord({"protocol": PROTOCOL, "version": 0, "head": HEAD})
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def replies(*records: dict[str, Any]) -> list[Message]:
        asked = Message(RecordDict(), dst_node_id=1, message_type="evaluate")
        found = [Message(RecordDict(some), reply_to=asked) for some in records]
        for node, reply in enumerate(found, 1):
            reply.metadata.__dict__["_src_node_id"] = node
        return found

    server = strategy(ServerConfig())
    server.facts[1] = RoundFacts()
    server.aggregate_evaluate(1, replies(*contents, {"header": of_config}))
    assert server.facts[1].failed_adoptions == len(contents)
    collector = ReleaseCollector(ServerConfig(), SCHEMA, 1, row_of(start()), {k: str(k) for k in range(9)}, Limits())
    collector.ask(map(str, range(9)), version=0)
    for reply in replies(*contents, {"header": head}, {"header": head, "arrays": of_config}):
        collector.take(reply)
    assert collector.close().refused == {"malformed": 5, "failed": 1} and not collector.rule.count


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (ServerConfig(rule="krum", byzantine=1), 5),
        (ServerConfig(rule="krum", byzantine=0, krum_keep=4), 4),
        (ServerConfig(rule="trimmed-mean", trimmed_share=0.3), 4),
    ],
)
def test_a_rule_makes_nothing_of_fewer_releases_than_it_needs(config: ServerConfig, needed: int) -> None:
    """One of those that it needs sends nothing: the shared adapter stays, and how many came is counted."""
    names, begun = [f"d{k}" for k in range(needed)], drawn(1, 1)[0]
    sent: dict[str, Row | None] = dict(zip(names, drawn(0, needed), strict=True))
    server = strategy(config)
    server.start(grid_of(Scripted(sent), names), start(begun), 1)
    assert (server.facts[1].releases, server.facts[1].refused) == (needed, {})
    server = strategy(config)
    found = server.start(grid_of(Scripted({**sent, "d0": None}), names), start(begun), 1)
    assert np.array_equal(row_of(found.arrays), begun)
    assert server.facts[1].refused == {"no-release": 1, "too-few": needed - 1} and server.facts[1].change_norm_l2 == 0


def operator(
    config: ServerConfig, there: Callable[[], Sequence[str]], told: list[str], least: int = 0
) -> OperatorStrategy:
    """Of a server's folder, for devices `d0` and on, of which these are there."""
    link = SimpleNamespace(online=lambda: {n: int(n[1:]) + 1 for n in there()})
    terms = Terms(name="orchard")
    return OperatorStrategy(
        config,
        SCHEMA,
        terms,
        new_key(),
        link,
        told.append,
        least_releases=least,  # type: ignore[arg-type]
    )


def test_an_operator_asks_again_and_tells_what_was_missing() -> None:
    """Three times in all, each time the same question; then the round is over, without an aggregate."""
    names, told = [f"d{k}" for k in range(5)], list[str]()
    devices = Scripted({**dict(zip(names, drawn(0, 5), strict=True)), "d0": None})
    server = operator(ServerConfig(rule="krum", byzantine=1), lambda: names, told)
    assert server.collected(1, start(), grid_of(devices, names), 1.0) is None
    assert told == ["round 1: 4 of 5 releases; once more"] * 2
    assert [name for name, _, _ in devices.asked] == names * 3 and server.facts[1].refused["too-few"] == 4


def test_a_share_of_the_devices_is_as_many_as_the_terms_ask_for() -> None:
    """A half of four devices would be two; of three releases an aggregate is made, so that three are asked."""
    names, told = [f"d{k}" for k in range(4)], list[str]()
    devices = Scripted(dict(zip(names, drawn(0, 4), strict=True)))
    server = operator(ServerConfig(sampled_share=0.5), lambda: names, told, least=3)
    assert server.collected(1, start(), grid_of(devices, names), 1.0) is not None
    assert len({name for name, _, _ in devices.asked}) == len(devices.asked) == 3 and not told


def test_a_round_asks_the_same_devices_again_and_others_for_those_alone_who_have_gone() -> None:
    """Half of six, then half of eight, as two more come: the same three each time, until one of them has gone."""
    every, told = [f"d{k}" for k in range(8)], list[str]()
    devices = Scripted(dict.fromkeys(every))  # nobody sends a release
    there = every[:6]
    server = operator(ServerConfig(sampled_share=0.5), lambda: there, told, least=3)

    def tell(line: str) -> None:  # between two tries
        nonlocal there
        there = every if not told else [n for n in every if n != devices.asked[0][0]]
        told.append(line)

    server.tell = tell
    assert server.collected(1, start(), grid_of(devices, every), 1.0) is None and len(told) == 2
    asked = [name for name, _, _ in devices.asked]
    first, second, third = asked[:3], asked[3:6], asked[6:]
    assert first == second and len(set(third)) == 3 and set(first) - set(third) == {first[0]}


def test_a_release_whose_product_is_too_large_is_refused_whole() -> None:
    large = np.full(WIDTH, 4e3, np.float32)
    names = ["a", "b"]
    server = ReleaseStrategy(ServerConfig(), SCHEMA, 0, ReleaseNoise(), limits=Limits(1e9))
    found = server.start(grid_of(Scripted({"a": large, "b": drawn(0, 1)[0]}), names), start(), 1)
    facts = server.facts[1]
    assert (facts.releases, facts.refused) == (1, {"malformed": 1}) and set(server.ledger_heads) == {"b"}
    np.testing.assert_allclose(row_of(found.arrays), drawn(0, 1)[0], atol=1e-6)


def test_what_noise_on_the_sum_does_not_cover_is_not_made_of_releases() -> None:
    rows = drawn(0, 2)
    releases = Scripted({"a": rows[0], "b": rows[1]})
    server = strategy(ServerConfig(), ReleaseNoise(on_sum=5.0, secret=1))
    server.start(grid_of(releases, ["a", "b"]), start(), 1)
    assert server.facts[1].averaging_error is None
    for products in ("residual", "stack"):
        overrides = [f"server.products={products}", "shared.adapter.factors=both", "privacy.mode=user-central"]
        with pytest.raises(ConfigError, match="does not cover"):
            load_config(config_folder() / "quickstart.toml", overrides)


BUFFERED = ("world.classes=world/devices", "server.buffer=2", "server.concurrency=2")
CORRELATED = ("privacy.mode=user-central", "server.noise_bands=3", "privacy.releases=1")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ((*BUFFERED, "server.sampled_share=0.5"), "has no rounds"),
        ((*BUFFERED, "world.deadline_s=9"), "has no rounds"),
        ((*CORRELATED, "server.sampled_share=0.5"), "in its turn"),
        (("server.rule=none", "world.classes=world/devices"), "has no server"),
        (("server.rule=krum", "server.byzantine=9", "data.users=20"), "needs 21 releases in a round of 20 devices"),
        (("server.rule=trimmed-mean", "data.users=20", "server.sampled_share=0.4"), "10 releases in a round of 8"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(overrides: tuple[str, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_config(config_folder() / "quickstart.toml", overrides)


def test_a_checkpoint_holds_the_heads_of_a_million_ledgers(tmp_path: Path) -> None:
    heads = {f"device-{k:07d}": f"{k:064x}" for k in range(1_200_000)}
    RunFolder(tmp_path).save_shared(1, {"a": np.zeros(3, np.float32)}, heads, {})
    found = RunFolder(tmp_path).shared(1)
    assert found.heads == heads and set(found.shared) == {"a"}
    RunFolder(tmp_path).save_shared(2, {"a": np.zeros(3, np.float32)}, {}, {})
    assert RunFolder(tmp_path).shared(2).heads == {}
