"""Kinds of servers, worlds and uploads in whole runs, and what a driver does for many devices."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import example, given, settings
from hypothesis import strategies as st

from florilegium.client.calibration import release_limits
from florilegium.client.flower_arrays import Numbers, to_record
from florilegium.privacy.release import Release, Schema
from florilegium.server.config import ServerConfig
from florilegium.server.release_collector import Limits, ReleaseCollector
from florilegium.simulation.config import ExperimentConfig, load_config, with_absolute_paths
from florilegium.simulation.data.population import Bootstrapped, DataConfig, User, load_population
from florilegium.simulation.devices.simulated import load_devices
from florilegium.simulation.devices.workload import planned_tokens
from florilegium.simulation.engines.scheduler import pack
from florilegium.simulation.experiment import run_experiment
from florilegium.simulation.runs.device_store import Shards
from florilegium.simulation.runs.folder import RunFolder, create
from florilegium.simulation.runs.progress import RunProgress, Speed
from florilegium.simulation.settings import ConfigError, config_folder

LEAN = (*SMALL, "data.users=6", "synthesis.per_dialogue=0", "evaluation.rouge_queries_per_user=0",
        "evaluation.pooled_epochs=0")  # fmt: skip


def config(*overrides: str) -> ExperimentConfig:
    return load_config(config_folder() / "quickstart.toml", [*LEAN, "name=run", *overrides])


def events(folder: Path, kind: str) -> list[Any]:
    return [e for e in RunFolder(folder).events() if e.kind == kind]


def shared_of(folder: Path) -> dict[str, np.ndarray]:
    last = RunFolder(folder).last_shared()
    assert last
    return last.shared


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six devices, two rounds, the defaults."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    run_experiment(config(), folder)
    return folder


@pytest.mark.slow
def test_without_a_server_devices_learn_alone_and_nothing_leaves(plain: Path, tmp_path: Path) -> None:
    run_experiment(config("server.rule=none", "evaluation.newcomers=2"), tmp_path / "run")
    (told,) = [e for e in events(tmp_path / "run", "evaluation") if (e.arm, e.metric) == ("personal", "nll")]
    (control,) = [e for e in events(plain, "evaluation") if (e.arm, e.metric) == ("local", "nll")]
    assert told.mean_per_user == pytest.approx(control.mean_per_user, abs=1e-4)
    assert {e.arm for e in events(tmp_path / "run", "evaluation")} == {"base", "personal", "shuffled"}
    assert {e.arm for e in events(tmp_path / "run", "newcomers")} == {"base", "personal"}
    asked = events(tmp_path / "run", "device_round")
    assert len(asked) == 12 and not any(e.upload_bytes or e.epsilon for e in asked)
    assert sum(e.releases for e in events(tmp_path / "run", "round")) == 0
    (ledger,) = (tmp_path / "run").rglob("ledger.db")
    with closing(sqlite3.connect(ledger)) as connection:
        assert connection.execute("SELECT count(*) FROM entry").fetchone() == (0,)  # nobody paid
    assert "nothing left the devices" in (tmp_path / "run" / "report.html").read_text("utf-8")


# -- what the server makes of releases ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("server.rule=trimmed-mean", "server.trimmed_share=0.2", "server.optimizer=fedavgm"),
        ("server.rule=krum", "server.byzantine=1", "server.krum_keep=3", "server.optimizer=fedadam",
         "server.learning_rate=0.05"),
    ],
    ids=["trimmed mean, momentum", "krum, adam"],
)  # fmt: skip
def test_a_server_with_another_rule_and_optimizer_ends_elsewhere(
    plain: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    run_experiment(config(*overrides), tmp_path / "run")
    ours, theirs = shared_of(plain), shared_of(tmp_path / "run")
    assert any(not np.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert [e.releases for e in events(tmp_path / "run", "round")] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "size", "off"), [("bf16", 1 / 2, 2**-8), ("int8", 1 / 4, 1 / 100)])
def test_fewer_bits_travel_and_the_adapter_is_nearly_the_same(
    plain: Path, tmp_path: Path, encoding: str, size: float, off: float
) -> None:
    summary = run_experiment(config(f"shared.upload={encoding}"), tmp_path / "run")
    full = json.loads((plain / "summary.json").read_text())["upload_bytes_per_release"]
    assert size * full <= summary.upload_bytes_per_release <= size * full + 4 * 4  # layers, bytes of a scale
    for name, ours in shared_of(plain).items():
        assert 0 < np.abs(ours - shared_of(tmp_path / "run")[name]).max() <= 2 * off * np.abs(ours).max()


@pytest.mark.slow
def test_exact_products_are_sent_as_changes_of_weights(tmp_path: Path) -> None:
    """FedEx keeps the means and adds what they miss; FLoRA adds all and begins anew: their functions agree."""
    both = ("shared.adapter.factors=both", "rounds=1")
    kinds = ("average", "residual", "stack")
    for kind in kinds:
        run_experiment(config(*both, f"server.products={kind}"), tmp_path / kind)
    average, residual, stack = (shared_of(tmp_path / kind) for kind in kinds)
    assert all(np.array_equal(average[n], residual[n]) for n in average)
    layer = "model.layers.0.self_attn.v_proj"
    means = residual[f"{layer}.lora_B"] @ residual[f"{layer}.lora_A"]
    anew = stack[f"{layer}.lora_B"] @ stack[f"{layer}.lora_A"]
    assert np.abs(anew).max() == 0 and np.abs(means).max() > 0
    np.testing.assert_allclose(means + residual[f"{layer}.weight"], stack[f"{layer}.weight"], atol=1e-5)
    (round_event,) = events(tmp_path / "average", "round")
    assert 0 < round_event.averaging_error < 1
    nll = {k: json.loads((tmp_path / k / "summary.json").read_text())["nll"]["shared"] for k in kinds}
    assert nll["residual"]["mean_per_user"] == pytest.approx(nll["stack"]["mean_per_user"], abs=1e-3)
    assert nll["residual"]["mean_per_user"] != pytest.approx(nll["average"]["mean_per_user"], abs=1e-3)


def test_what_is_sent_beside_the_adapter_is_part_of_the_devices_model(tmp_path: Path) -> None:
    """A change ΔW of a frozen weight gives the same as an adapter with B A = ΔW, under the adapter's scale."""
    from florilegium.client.phases import frozen_adapters

    context = load_devices(create(tmp_path / "run", config("shared.adapter.factors=both"))).context
    row = 0.05 * torch.randn(context.shared_layout.width, generator=torch.Generator().manual_seed(0))
    whole = context.whole.with_weights()
    arrays = context.whole.split(row.numpy())
    zero = {name: np.zeros(shape, np.float32) for name, shape in whole.shapes}
    products = {
        name: arrays[name.replace(".weight", ".lora_B")] @ arrays[name.replace(".weight", ".lora_A")]
        for name in zero
        if name.endswith(".weight")
    }
    sent = torch.from_numpy(whole.join({**zero, **products}))
    example = context.lm.format.dialogues([next(iter(load_population(DataConfig(users=1), 0))).held_out[0]])
    as_factors, as_weights = (
        context.lm.score(example, [0], frozen_adapters(r, ["d"], context))[0].nll for r in (row, sent)
    )
    assert as_weights == pytest.approx(as_factors, rel=1e-4)
    assert abs(as_weights - context.lm.score(example, [0], [])[0].nll) > 1e-2


@pytest.mark.parametrize("mode", ["example-local", "user-local", "user-central"])
@pytest.mark.parametrize("encoding", ["fp32", "int8"])
def test_no_honest_release_is_too_large(tmp_path: Path, mode: str, encoding: str) -> None:
    chosen = config(f"privacy.mode={mode}", f"shared.upload={encoding}", "rounds=1", "data.users=3")
    run_experiment(chosen, tmp_path / "run")
    (event,) = events(tmp_path / "run", "round")
    assert event.refused == {} and event.releases == 3
    largest, clip = release_limits(chosen, load_devices(RunFolder(tmp_path / "run")).schema)
    if mode == "user-central":
        assert clip == chosen.privacy.clip_norm_l2 < largest < 1.2 * clip
    else:
        assert event.change_norm_l2 < largest < 100 * event.change_norm_l2 and clip == np.inf


def test_where_the_server_adds_the_noise_no_release_is_worth_more_than_the_noise_was_made_for() -> None:
    """Rounded to 8 bits, a clipped change can be longer than what it was clipped to."""
    schema = Schema((("q.lora_A", (2, 3)), ("q.lora_B", (4, 2))))
    collector = ReleaseCollector(ServerConfig(), schema, 1, np.zeros(14, np.float32), {7: "d"}, Limits(2.0, 1.0))
    collector.ask(["d"], version=0)
    header = ConfigRecord({"protocol": 1, "version": 0, "head": "0" * 64})
    content = RecordDict({"header": header, "arrays": to_record(schema.split(np.full(14, 0.4, np.float32)))})
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 7
    asked = Message(RecordDict(), dst_node_id=7, message_type="train")
    collector.take(Message(content, reply_to=asked))
    assert collector.close().releases == 1 and 0.99 < np.linalg.norm(collector.rule.change()) <= 1


# -- a world ------------------------------------------------------------------------------------------------------

WORLD = ("world.classes=world/devices", "rounds=3")


def test_a_world_decides_who_answers_and_what_it_costs(tmp_path: Path) -> None:
    run_experiment(config(*WORLD, "server.sampled_share=0.5", "world.over_sampling=2"), tmp_path / "run")
    played = events(tmp_path / "run", "world")
    for world, of_round in zip(played, events(tmp_path / "run", "round"), strict=True):
        outcomes = [f.outcome for f in world.fates]
        assert len(outcomes) == 6 and of_round.releases == outcomes.count("answers") <= 3
        assert of_round.silent == 6 - of_round.releases
        idle = [f for f in world.fates if f.outcome == "unavailable"]
        assert all(f.energy_joules == 0 for f in idle)
    assert played[1].starts_s == played[0].starts_s + played[0].duration_s + 60
    (fairness,) = events(tmp_path / "run", "fairness")
    assert sum(c.asked for c in fairness.classes.values()) == 18
    assert fairness.wall_s > 0 and 0 < fairness.fairness.jain_participation <= 1


def test_buffered_releases_begin_from_older_versions(tmp_path: Path) -> None:
    run_experiment(config(*WORLD, "server.buffer=2", "server.concurrency=4"), tmp_path / "run")
    rounds = events(tmp_path / "run", "round")
    assert all(1 <= e.releases <= 2 and e.refused == {} for e in rounds)  # one device may come twice
    played = [[f.outcome for f in e.fates] for e in events(tmp_path / "run", "world")]
    assert all(outcomes.count("answers") == 2 for outcomes in played)
    devices = events(tmp_path / "run", "device_round")
    assert len(devices) == sum(e.releases for e in rounds) and all(e.upload_bytes > 0 for e in devices)


def test_a_device_with_room_for_a_part_of_the_rank_sends_that_part(tmp_path: Path) -> None:
    """Its columns of B change, the others do not; and a server without others' releases leaves them alone."""
    (tmp_path / "classes.toml").write_text(SMALL_RANK)
    run_experiment(config(f"world.classes={tmp_path / 'classes.toml'}", "rounds=1"), tmp_path / "run")
    (event,) = events(tmp_path / "run", "round")
    sent = events(tmp_path / "run", "device_round")
    assert event.releases == 6 and {e.upload_bytes for e in sent} == {12_288 // 4}
    for array in shared_of(tmp_path / "run").values():
        assert np.abs(array[:, :1]).min() > 0 and np.abs(array[:, 1:]).max() == 0
    mode = config(f"world.classes={tmp_path / 'classes.toml'}", "privacy.mode=user-local")
    with pytest.raises(ConfigError, match="unequal rank"):
        load_devices(create(tmp_path / "other", mode))


SMALL_RANK = f"""
name = "small"
[[classes]]
name = "small"
share = 1.0
train_tokens_per_s = 100
memory_bytes = 8_000_000_000
up_bits_per_s = 1e6
down_bits_per_s = 1e6
joules_per_token = 0.1
joules_per_byte = 1e-6
available = {[1.0] * 24}
rank = 1
source = "assumed"
"""


# -- many devices -------------------------------------------------------------------------------------------------


def test_newcomers_are_evaluated_and_never_asked(tmp_path: Path) -> None:
    run_experiment(config("evaluation.newcomers=2", "evaluation.users=3"), tmp_path / "run")
    arms = {e.arm: e for e in events(tmp_path / "run", "newcomers")}
    assert set(arms) == {"base", "shared", "personal"} and all(e.users == 2 for e in arms.values())
    assert len({e.mean_per_user for e in arms.values()}) == 3
    assert {e.device for e in events(tmp_path / "run", "device_round")} == {f"device-0000{k}" for k in range(6)}
    assert len({e.device for e in events(tmp_path / "run", "result")}) == 3


def test_more_devices_than_people_are_resampled_from_them() -> None:
    real = load_population(DataConfig(users=2, split="development"), seed=0)
    assert isinstance(real, list)
    many = Bootstrapped(real, 7, seed=0)
    assert [u.id for u in many[:2]] == [u.id for u in real] and len(list(many)) == 7
    copy, again = many[4], many[4]
    assert copy == again and copy.id == f"{real[0].id}~2" and copy.held_out == real[0].held_out
    assert len({d.id for d in copy.stream}) == len(copy.stream) == len(real[0].stream)
    assert {d.response for d in copy.stream} < {d.response for d in real[0].stream}
    assert [d.time for d in copy.stream] == sorted(d.time for d in copy.stream)
    with pytest.raises(IndexError):
        many[7]
    beside = Bootstrapped(real, 7, seed=0).with_apart(1)
    assert len(beside) == 7 and beside[6] == real[1]
    assert {beside[k].id.partition("~")[0] for k in range(6)} == {real[0].id}  # nothing of a newcomer is elsewhere
    config_ = DataConfig(users=2_000, split="all", bootstrap=True)
    assert len(load_population(config_, 0)) == 2_000


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 9))
@example([1, 1, 3, 3, 2], 3, 1)
def test_cohorts_hold_everybody_once_and_homes_have_like_loads(
    tmp_path_factory: pytest.TempPathFactory, loads: list[int], homes: int, size: int
) -> None:
    shards = Shards.create(tmp_path_factory.mktemp("shards"), 2 * homes)
    tokens = {f"d{k}": float(load) for k, load in enumerate(loads)}
    cohorts = pack(list(tokens), tokens, shards, homes, size)
    names = [name for c in cohorts for name in c.names]
    assert sorted(names) == sorted(tokens) and all(1 <= len(c.names) <= size for c in cohorts)
    by_home = [sum(tokens[n] for c in cohorts if c.home == h for n in c.names) for h in range(homes)]
    assert max(by_home) - min(by_home) <= max(loads)


def test_planned_tokens_count_each_pass(people: list[User]) -> None:
    """32 dialogues over two rounds, a pool of 24 at rate ½, 6 bins: 16 read, 12 and 6 trained on."""
    person = User("u", people[0].stream[:32], ())
    planned = planned_tokens(person, config("shared.pool_capacity=24", "shared.batch_size=12"))
    length = planned.read / 16
    assert planned.shared == pytest.approx(12 * length) and planned.personal == pytest.approx(6 * length)
    assert planned.before == pytest.approx(12 * length + 16 * length / 3)
    whole = config("privacy.mode=user-central", "shared.steps_per_round=3", "shared.batch_size=12")
    assert planned_tokens(person, whole).shared == pytest.approx(3 * 12 * length)


def test_arrays_are_written_when_they_go_onto_a_wire() -> None:
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours, theirs = to_record({"a": numbers})["a"], Array(numbers)
    assert isinstance(ours, Numbers) and (ours.dtype, ours.shape, ours.stype) == (
        theirs.dtype,
        theirs.shape,
        theirs.stype,
    )
    assert ours.data == theirs.data and np.array_equal(ours.numpy(), numbers)
    assert np.array_equal(ArrayRecord({"a": ours})["a"].numpy(), numbers)
    with pytest.raises(ValueError, match="read-only"):
        ours.numpy()[0, 0] = 1.0


def test_a_pulse_tells_what_is_done_and_how_fast(plain: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    progress = RunProgress()
    progress.changed = lambda: heard.append((progress.phase, progress.round, progress.visits))
    run_experiment(config(), tmp_path / "run", progress=progress)
    assert progress.visits == 2 * 2 * 6 and progress.round == 2 and heard[-1][0] == "report"
    assert progress.tokens == json.loads((plain / "summary.json").read_text())["tokens_trained"] > 0
    assert all(unit in Speed().told(progress) for unit in ("devices/s", "tokens/s", "GB"))


def test_paths_in_a_config_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chats.jsonl").touch()
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    found = with_absolute_paths(config("data.name=chats.jsonl", "world.classes=world/devices"))
    assert found.data.name == str(tmp_path / "chats.jsonl") and found.model.name == "nano"
    assert Path(found.world.classes).is_absolute() and with_absolute_paths(found) == found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.products=residual", r"needs shared.adapter.factors = 'both'"),
        ("server.buffer=4", "needs server.concurrency"),
        ("world.drop_out=0.1", "world.classes"),
        ("ray.actors=-1", "greater than or equal to 0"),
        ("server.trimmed_share=0.5", "less than 0.5"),
    ],
)
def test_settings_that_do_not_go_together_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(override)


def test_noise_on_a_sum_and_rules_that_sum_nothing_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"user-central.*rule = 'krum'"):
        config("privacy.mode=user-central", "server.rule=krum")
    with pytest.raises(ConfigError, match="needs releases of one version"):
        config("server.buffer=2", "server.concurrency=2", "server.products=stack", "shared.adapter.factors=both")


def test_a_release_of_a_lower_rank_names_its_rank(tmp_path: Path) -> None:
    schema = load_devices(create(tmp_path / "run", config("shared.adapter.factors=both"))).schema
    part = schema.of_round(1, rank=2)
    release = Release.of(np.ones(part.width, np.float32), 0, "0" * 64, part)
    assert schema.rank_of(release.arrays, 1) == 2 and schema.places(1, 2).sum() == part.width
    assert schema.rank_of(schema.split(np.ones(schema.width, np.float32)), 1) == 0
