"""What must not change a run, or only as far as it says: how many processes there are, who of them dies and when,
what a disk, a device's data or a server's senders do. Real runs of the bundled model, real processes, real signals.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import psutil
import pytest
import tomli_w
import torch
from conftest import SMALL
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from test_simulation import assert_same_adapters

from florilegium.client.flower_arrays import to_record
from florilegium.client.flower_replies import Instruction
from florilegium.client.lm.model import LanguageModel
from florilegium.client.state import DeviceState
from florilegium.privacy.common.errors import DeviceFaultError
from florilegium.privacy.noise import ReleaseNoise
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Array
from florilegium.server.config import ServerConfig
from florilegium.server.release_collector import Limits, to_numpy
from florilegium.server.strategy import NoReleaseError, ReleaseStrategy
from florilegium.simulation.baselines.devices import run_devices_of_worker
from florilegium.simulation.benchmarks.scale_florilegium import ROUNDS, Nobody, ours
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.devices.people import device_name
from florilegium.simulation.devices.simulated import SimulatedDevices, load_devices
from florilegium.simulation.engines.cohort_grid import CohortGrid, released
from florilegium.simulation.engines.faults import attempt
from florilegium.simulation.engines.placement import open_workers
from florilegium.simulation.engines.ray_actors import RayWorkers
from florilegium.simulation.engines.scheduler import Scheduler
from florilegium.simulation.engines.workers import Cohort, LocalWorkers, Workers
from florilegium.simulation.experiment import run_experiment
from florilegium.simulation.recorder import federate_run
from florilegium.simulation.runs.callbacks import Callback, RunFacts
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import RoundEnd, RunEnd
from florilegium.simulation.runs.folder import RunFolder, create
from florilegium.simulation.settings import config_folder

USERS = 5
QUICK = (
    *SMALL,
    f"data.users={USERS}",
    "cohort_size=2",  # three cohorts over three shards
    "ray.shards=3",
    "workers=1",
    "evaluation.pooled_epochs=0",
    "evaluation.rouge_queries_per_user=0",
    "name=quick",
)
NAMES = [device_name(k) for k in range(USERS)]
COMMAND = [str(Path(sys.executable).parent / "florilegium"), "run", "quickstart", *QUICK]
same_adapters = partial(assert_same_adapters, count=1 + USERS)


def quick(*overrides: str) -> ExperimentConfig:
    return load_config(config_folder() / "quickstart.toml", [*QUICK, *overrides])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in this process."""
    path = tmp_path_factory.mktemp("undisturbed") / "quick"
    run_experiment(quick(), path)
    return path


def states(run: Path) -> list[DeviceState]:
    """Of all devices, after the last round."""
    stored = RunFolder(run).shards.states.find(NAMES)
    return [found[1] for found in map(stored.__getitem__, NAMES) if found]


def ledgers(run: Path) -> list[tuple[Any, ...]]:
    """Every line of every account, by device and number."""
    rows: list[tuple[Any, ...]] = []
    for path in run.glob("devices/*/ledger.db"):
        with sqlite3.connect(path) as connection:
            rows += connection.execute("SELECT * FROM entry").fetchall()
    return sorted(rows)


def charged(run: Path) -> dict[str, list[int]]:
    """The rounds that each device has paid for."""
    rounds: dict[str, list[int]] = {}
    for device, _, _, number, *_ in ledgers(run):
        rounds.setdefault(device, []).append(number)
    return rounds


def told(run: Path, *kinds: str) -> list[str]:
    """The events of these kinds, without what a clock on the wall says."""
    events = (json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines())
    rest = (
        {k: v for k, v in e.items() if k not in ("time", "seconds", "wall_s")} for e in events if e["event"] in kinds
    )
    return sorted(json.dumps(e) for e in rest)


def assert_same_run(one: Path, other: Path) -> None:
    """Another process computed it: the same bits."""
    same_adapters(one, other)
    assert ledgers(one) == ledgers(other)
    assert all(numbers == [1, 2] for numbers in charged(other).values())  # each round once
    kinds = "device_round", "round", "world", "evaluation", "result", "comparison", "fairness"
    assert told(one, *kinds) == told(other, *kinds)


def assert_like(one: Path, other: Path) -> None:
    """Other cohorts computed it: the same choices, texts and noise; numbers as far as rounding goes."""
    for mine, yours in zip(states(one), states(other), strict=True):
        assert [k.id for k in mine.buffer.bins] == [k.id for k in yours.buffer.bins]
        assert mine.pool == yours.pool and mine.replies == yours.replies
        assert mine.synthetic == yours.synthetic and mine.secret == yours.secret
    assert charged(one) == charged(other) == {name: [1, 2] for name in NAMES}
    for number in (1, 2):  # what rounding may change is nothing beside the noise
        mine_row, yours_row = (_row(RunFolder(run).shared(number).shared) for run in (one, other))
        assert np.linalg.norm(mine_row - yours_row) < 1e-5 < 0.1 < np.linalg.norm(mine_row)
    same_adapters(one, other, rounding=True)


def _row(arrays: Mapping[str, Array]) -> Array:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


# -- the same everywhere ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cohorts_of_one_select_write_and_draw_the_same(undisturbed: Path, tmp_path: Path) -> None:
    run_experiment(quick("cohort_size=1", "ray.shards=1"), tmp_path / "run")
    assert_like(undisturbed, tmp_path / "run")


def test_two_processes_give_the_same_bits_and_one_goes_on_from_there(undisturbed: Path, tmp_path: Path) -> None:
    class Stopping(Callback):
        def on_round_end(self, facts: RunFacts) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(quick("workers=2"), tmp_path / "run", callbacks=[Stopping()])
    run_experiment(quick(), tmp_path / "run", resuming=True)
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_two_actors_select_write_and_draw_the_same_beside_a_foreign_module(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text("raise SystemExit('a foreign client.py was imported')")
    done = subprocess.run([*COMMAND, "ray.actors=2", "cohort_size=1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_like(undisturbed, tmp_path / "runs" / "quick")


# -- the server and what it is sent -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[SimulatedDevices, dict[str, Message]]:
    """Seven devices and their real replies of round 1."""
    config = quick("data.users=7", "cohort_size=7")
    devices = load_devices(create(tmp_path_factory.mktemp("asked") / "run", config))
    names = list(devices.users)
    strategy, grid = _server(devices)
    messages = strategy.messages(names, 1, 0, strategy.begin(np.zeros(devices.schema.width, np.float32)), "train")
    sent = {names[r.metadata.src_node_id - 1]: r for r in grid.send_and_receive(messages)}
    assert all("arrays" in reply.content for reply in sent.values())
    return devices, sent


def _server(devices: SimulatedDevices, **settings: Any) -> tuple[ReleaseStrategy, CohortGrid]:
    """A server before round 1, and the grid of its devices."""
    names = list(devices.users)
    grid = CohortGrid(Scheduler(LocalWorkers(devices), devices).map, devices.schema, names)
    noise = ReleaseNoise()
    strategy = ReleaseStrategy(ServerConfig(**settings), devices.schema, 0, noise, limits=Limits(20.0))
    strategy.greet(grid)
    strategy.configure_train(1, strategy.begin(np.zeros(devices.schema.width, np.float32)), ConfigRecord(), grid)
    return strategy, grid


def _aggregated(
    devices: SimulatedDevices, replies: Sequence[Message], **settings: Any
) -> tuple[Array, ReleaseStrategy]:
    strategy, _ = _server(devices, **settings)
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return _row(to_numpy(arrays)), strategy


def _numbers(reply: Message) -> Array:
    return _row(to_numpy(reply.content.array_records["arrays"]))


def _forged(
    reply: Message,
    change: Callable[[Array], np.ndarray[Any, Any]] = lambda a: a,
    header: Mapping[str, Any] | None = None,
    arrays: ArrayRecord | None = None,
) -> Message:
    """A reply of the same device with other content."""
    before = reply.content.config_records["header"], reply.content.array_records["arrays"]
    content = RecordDict({"header": ConfigRecord({**before[0], **(header or {})})})
    content["arrays"] = arrays or to_record({n: change(a.numpy()) for n, a in before[1].items()})
    forged = Message(content, dst_node_id=1, message_type="train")
    forged.metadata.__dict__.update(reply.metadata.__dict__)
    return forged


@pytest.mark.parametrize("rule", [{}, {"rule": "trimmed-mean", "trimmed_share": 0.2}, {"rule": "krum", "byzantine": 2}])
def test_given_releases_have_one_aggregate_in_any_order(
    asked: tuple[SimulatedDevices, dict[str, Message]], rule: dict[str, Any]
) -> None:
    devices, sent = asked
    expected, _ = _aggregated(devices, list(sent.values()), **rule)
    for seed in range(20):
        shuffled = random.Random(seed).sample(list(sent.values()), len(sent))
        assert np.array_equal(_aggregated(devices, shuffled, **rule)[0], expected)


def _with_one(value: float) -> Callable[[Array], Array]:
    def spoiled(array: Array) -> Array:
        other = array.copy()
        other.flat[0] = value
        return other

    return spoiled


def _garbage(data: bytes) -> Callable[[Message], Message]:
    def spoiled(reply: Message) -> Message:
        record = reply.content.array_records["arrays"]
        bad = {n: FlowerArray(a.dtype, a.shape, a.stype, data) for n, a in record.items()}
        return _forged(reply, arrays=ArrayRecord(bad))

    return spoiled


POISONS: dict[str, tuple[str, Callable[[Message], Message]]] = {
    "nan": ("malformed", partial(_forged, change=_with_one(np.nan))),
    "infinite": ("malformed", partial(_forged, change=_with_one(-np.inf))),
    "huge": ("too-large", partial(_forged, change=lambda a: 1e4 * a)),
    "one huge number": ("too-large", partial(_forged, change=_with_one(1e30))),
    "shape": ("malformed", partial(_forged, change=lambda a: a.T.copy())),
    "one number": ("malformed", partial(_forged, change=lambda a: a.reshape(-1)[:1])),
    "wider": ("malformed", partial(_forged, change=lambda a: np.concatenate([a, a], axis=1))),
    "double": ("malformed", partial(_forged, change=lambda a: a.astype(np.float64))),
    "texts": ("malformed", partial(_forged, change=lambda a: a.astype("U8"))),
    "other version": ("wrong-version", partial(_forged, header={"version": 1})),
    "other protocol": ("wrong-version", partial(_forged, header={"protocol": 9})),
    "head that is none": ("malformed", partial(_forged, header={"head": "x" * 10_000})),
    "head that is bytes": ("malformed", partial(_forged, header={"head": b"\xff"})),
    "code that is none": ("malformed", partial(_forged, header={"error": "<script>alert(1)</script>"})),
    "no array": ("malformed", _garbage(b"")),
    "torn array": ("malformed", _garbage(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', (")),
    "archive": ("malformed", _garbage(b"PK\x03\x04" + bytes(200))),
    "array without end": (
        "malformed",
        _garbage(b"\x93NUMPY\x01\x00F\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,)}\n"),
    ),
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_release_is_refused_and_the_rest_is_what_counts(
    asked: tuple[SimulatedDevices, dict[str, Message]], poison: str
) -> None:
    devices, sent = asked
    code, spoil = POISONS[poison]
    bad, *good = sent.values()
    change, strategy = _aggregated(devices, [spoil(bad), *good])
    assert np.array_equal(change, _aggregated(devices, good)[0])
    assert strategy.facts[1].refused == {code: 1} and strategy.facts[1].releases == 6
    assert set(strategy.ledger_heads) == set(sent) - {device_name(0)}


def test_who_answers_twice_or_unasked_counts_once_or_never(
    asked: tuple[SimulatedDevices, dict[str, Message]],
) -> None:
    devices, sent = asked
    first = next(iter(sent.values()))
    change, strategy = _aggregated(devices, [*sent.values(), _forged(first, lambda a: 2 * a), first])
    assert np.array_equal(change, _aggregated(devices, list(sent.values()))[0])
    assert strategy.facts[1].refused == {"not-asked": 2} and strategy.facts[1].releases == 7
    few, _ = _server(devices, sampled_share=3 / 7)
    few.aggregate_train(1, list(sent.values()))
    assert few.facts[1].refused == {"not-asked": 4} and few.facts[1].releases == 3


def test_a_round_of_nothing_but_poison_ends_the_run_in_words(
    asked: tuple[SimulatedDevices, dict[str, Message]],
) -> None:
    devices, sent = asked
    strategy, _ = _server(devices)
    with pytest.raises(NoReleaseError, match=r"round 1: no device sent a release: \{'malformed': 7\}"):
        strategy.aggregate_train(1, [_forged(r, _with_one(np.nan)) for r in sent.values()])


def test_a_greeting_of_garbage_is_passed_over(asked: tuple[SimulatedDevices, dict[str, Message]]) -> None:
    devices, _ = asked
    strategy, grid = _server(devices)
    strategy.nodes = {}
    plain = grid.send_and_receive

    def with_garbage(messages: Any, **named: Any) -> Iterator[Message]:
        for reply in plain(messages, **named):
            if reply.metadata.src_node_id == 1:
                reply.content.pop("header")
            yield reply

    grid.send_and_receive = with_garbage  # type: ignore[method-assign]
    strategy.greet(grid)
    assert strategy.names == [device_name(k) for k in range(1, 7)]


def test_a_well_formed_lie_moves_the_mean_and_hardly_a_robust_rule(
    asked: tuple[SimulatedDevices, dict[str, Message]],
) -> None:
    devices, sent = asked
    liar, *honest = sent.values()
    rows = np.stack([_numbers(reply) for reply in honest])  # (6, P)
    scale = 19.0 / np.linalg.norm(rows.mean(axis=0))
    lie = _forged(liar, lambda a: a * 0 - np.float32(19.0 / np.sqrt(rows.shape[1])))  # of norm 19, allowed are 20
    assert scale > 1
    robust = {"rule": "trimmed-mean", "trimmed_share": 0.2}, {"rule": "krum", "byzantine": 2}
    mean, _ = _aggregated(devices, [lie, *honest])
    trimmed, krum = (_aggregated(devices, [lie, *honest], **settings)[0] for settings in robust)
    allowed = 1e-6
    assert np.allclose(mean, (rows.sum(axis=0) + _numbers(lie)) / 7, atol=allowed)
    assert (trimmed >= rows.min(axis=0) - allowed).all() and (trimmed <= rows.max(axis=0) + allowed).all()
    assert min(np.abs(krum - row).max() for row in rows) < allowed  # one of the honest, whole
    truth = rows.mean(axis=0)
    assert np.linalg.norm(mean - truth) > 2.5 > np.linalg.norm(trimmed - truth)


# -- a device's own faults ----------------------------------------------------------------------------------------


def test_the_company_of_a_broken_device_releases_what_it_would_without(tmp_path: Path) -> None:
    runs = [create(tmp_path / name, quick()) for name in ("whole", "broken")]
    whole, healthy = (load_devices(run) for run in runs)
    model: Any = _Choking(healthy.context.lm, healthy.users[NAMES[2]].stream[0].prompt)
    broken = replace(healthy, context=replace(healthy.context, lm=model))
    question = Instruction("train", RoundPlan(1, 0), torch.zeros(whole.schema.width))
    mine = dict(released(whole, NAMES, question))
    found = attempt(released, True, broken, NAMES, question)
    assert list(found.failed) == [NAMES[2]]
    for name, reply in (pair for _, answers in found.results for pair in answers):
        ours, theirs = (_row(dict(r.arrays or {})) for r in (mine[name], reply))  # type: ignore[arg-type]
        assert np.linalg.norm(ours - theirs) < 1e-5 < np.linalg.norm(ours)
        assert mine[name].header == reply.header


class _Choking:
    """The language model, but for one text that it cannot read."""

    def __init__(self, lm: LanguageModel, text: str) -> None:
        self.lm, self.text = lm, text

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def embed(self, texts: Sequence[str], readings: Sequence[str]) -> Any:
        if self.text in texts:
            raise DeviceFaultError("its text cannot be read")
        return self.lm.embed(texts, readings)


# -- worlds -------------------------------------------------------------------------------------------------------


def _classes(path: Path, *hours: float, memory_bytes: int = 10**12) -> Path:
    """Devices of one kind, that are there with these chances by the hour."""
    bundled = tomllib.loads((config_folder() / "world" / "devices.toml").read_text(encoding="utf-8"))
    kind = {**bundled["classes"][0], "share": 1.0, "memory_bytes": memory_bytes, "available": list(hours) * 24}
    path.write_text(tomli_w.dumps({"classes": [{k: v for k, v in kind.items() if k != "rank"}]}), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_round_that_everybody_drops_out_of_changes_nothing(tmp_path: Path) -> None:
    world = [f"world.classes={_classes(tmp_path / 'devices.toml', 1.0)}", "world.drop_out=0.7", "data.users=3"]
    config = quick(*world, "rounds=5", "server.optimizer=fedadam", "seed=1")
    summary = run_experiment(config, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    releases = {e.round: e.releases for e in run.events_of(RoundEnd)}
    assert sorted(releases) == [1, 2, 3, 4, 5] and 0 in releases.values() and any(releases.values()), releases
    for number, count in releases.items():
        before, after = run.shared(number - 1), run.shared(number)
        moved = any(not np.array_equal(before.shared[k], after.shared[k]) for k in after.shared)
        assert moved == bool(count)
        if not count:
            assert all(np.array_equal(before.moments[k], after.moments[k]) for k in after.moments)
    assert summary.rounds == 5 and summary.epsilon <= 8  # who dropped out has paid


def test_a_run_that_nobody_ever_answers_ends_where_it_began(tmp_path: Path) -> None:
    nobody = _classes(tmp_path / "devices.toml", 0.0)
    central = "privacy.mode=user-central", "evaluation.every_round=true"  # no noise on a sum of nothing
    summary = run_experiment(quick(f"world.classes={nobody}", *central, "data.users=2"), tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert (summary.epsilon, summary.upload_bytes_per_release, ledgers(run.path)) == (0.0, 0, [])
    first, last = run.shared(0).shared, run.shared(2).shared
    assert all(np.array_equal(first[k], last[k]) for k in first)


def test_fedbuff_says_that_nobody_can_ever_answer(tmp_path: Path) -> None:
    """It has no rounds that could pass without an answer: it would wait for ever."""
    for classes in (_classes(tmp_path / "a.toml", 0.0), _classes(tmp_path / "b.toml", 1.0, memory_bytes=1)):
        config = quick(f"world.classes={classes}", "server.buffer=2", "server.concurrency=2")
        with pytest.raises(RunError, match="no device can ever answer"):
            run_experiment(config, tmp_path / classes.stem)


# -- the disk -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_kept_grows_with_the_devices_and_not_with_the_rounds(tmp_path: Path) -> None:
    sizes = {}
    for rounds in (3, 6):
        run_experiment(quick(f"rounds={rounds}", "data.users=2"), tmp_path / str(rounds))
        (end,) = RunFolder(tmp_path / str(rounds)).events_of(RunEnd)
        sizes[rounds] = end.devices_bytes
        files = (p for p in (tmp_path / str(rounds) / "devices").rglob("*") if p.is_file())
        assert end.devices_bytes == sum(p.stat().st_size for p in files) > 0
    assert sizes[6] <= 1.3 * sizes[3]


def _in_words(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "error:" in done.stderr and message in done.stderr
    assert "disk is full" in done.stderr or "No space left" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("room", [150, 600])
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    undisturbed: Path, tmp_path: Path, room: int
) -> None:
    """A real file system of so many KiB; then it grows."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        command = [*COMMAND, "--runs", str(tmp_path)]
        _in_words(subprocess.run(command, capture_output=True, text=True), str(tmp_path))
        subprocess.run(["mount", "-o", "remount,size=100m", tmp_path], check=True)
        again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
        assert again.returncode == 0, again.stdout + again.stderr
        assert_same_run(undisturbed, tmp_path / "quick")
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# -- kill -9 ------------------------------------------------------------------------------------------------------

FORKED = multiprocessing.get_context("forkserver")  # a new process without the seconds that importing torch takes
FORKED.set_forkserver_preload(["florilegium.simulation.experiment"])


def _watched(config: ExperimentConfig, path: Path, until_s: float = np.inf) -> tuple[float, int]:
    """A run, or the rest of it, in a process that is killed after so many seconds of computing; those, and its exit."""
    resuming = (path / "config.toml").exists()
    process = FORKED.Process(target=run_experiment, args=(config, path), kwargs={"resuming": resuming})
    process.start()
    spent_s, seen = 0.0, psutil.Process(process.pid)
    while process.is_alive():
        with suppress(psutil.Error):
            times = seen.cpu_times()
            spent_s = max(spent_s, times.user + times.system)
        if spent_s >= until_s:
            process.kill()
        process.join(0.005)
    assert process.exitcode is not None
    return spent_s, process.exitcode


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    config, moments, seed = quick(), 3, 7
    whole_s, failed = _watched(config, tmp_path / "whole")
    assert not failed
    rng, exits = random.Random(seed), list[int]()
    for k in range(moments):
        after_s = 0.95 * whole_s * (k + rng.random()) / moments
        print(f"killed after {after_s:.2f} of {whole_s:.2f} s (seed {seed}, moment {k})")
        exits.append(_watched(config, tmp_path / str(k), after_s)[1])
        assert _watched(config, tmp_path / str(k))[1] == 0
        assert_same_run(tmp_path / "whole", tmp_path / str(k))
    assert exits.count(-signal.SIGKILL) >= moments - 1, exits  # the last may come too late


WORLD = "world.classes=world/devices", "world.drop_out=0.2", "seed=3"
KINDS = {
    "fedadam": ("server.optimizer=fedadam", "server.learning_rate=0.01"),
    "world": ("server.sampled_share=0.6", "world.over_sampling=1.3", *WORLD),
    "fedbuff": ("server.buffer=2", "server.concurrency=3", "rounds=4", *WORLD),
    "user-central": ("privacy.mode=user-central", "server.optimizer=fedavgm"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_again_and_again_remembers(kind: str, tmp_path: Path) -> None:
    """The optimizer's moments, the clock, the versions that devices have, what has been paid for."""
    config, rng = quick(*KINDS[kind]), random.Random(kind)
    whole_s, failed = _watched(config, tmp_path / "whole")
    assert not failed
    for number in range(3):
        after_s = whole_s * rng.uniform(0.4, 0.7)
        print(f"killed after {after_s:.2f} of {whole_s:.2f} s (seed {kind!r})")
        assert _watched(config, tmp_path / "run", after_s)[1] == -signal.SIGKILL or number
    assert _watched(config, tmp_path / "run")[1] == 0
    one, other = (RunFolder(tmp_path / name) for name in ("whole", "run"))
    same_adapters(one.path, other.path)
    assert ledgers(one.path) == ledgers(other.path)
    kinds = "device_round", "round", "world", "evaluation", "result", "comparison", "fairness"
    assert told(one.path, *kinds) == told(other.path, *kinds)
    mine, yours = one.last_shared(), other.last_shared()
    assert mine and yours and mine.heads == yours.heads and mine.moments.keys() == yours.moments.keys()
    assert all(np.array_equal(mine.moments[k], yours.moments[k]) for k in mine.moments)


# -- processes that die -------------------------------------------------------------------------------------------


def _federate(run: RunFolder, disturb: Callable[[Workers, Iterator[Any]], Iterator[Any]]) -> None:
    """A run on the actors of its config; `disturb` passes the results of each job on, and does what it wants."""
    devices = load_devices(run)
    with open_workers(run, devices, run_devices_of_worker) as fleet:
        scheduler = Scheduler(fleet, devices)
        grid = CohortGrid(lambda *job: disturb(fleet, scheduler.map(*job)), devices.schema, NAMES)
        federate_run(run, grid, scheduler)


def _pids(fleet: Workers) -> list[int]:
    assert isinstance(fleet, RayWorkers)
    return [actor.pid for actor in fleet.idle]


@pytest.mark.slow
def test_an_actor_killed_in_the_middle_of_a_round_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    run, killed = create(tmp_path / "run", quick("ray.actors=2", "cohort_size=1")), list[int]()

    def with_a_kill(fleet: Workers, results: Iterator[Any]) -> Iterator[Any]:
        pids = _pids(fleet)
        for number, result in enumerate(results):
            if number == 0 and len(killed) < 2:  # once while they contribute, once while they adopt
                killed.append(pids[-1])
                os.kill(pids[-1], signal.SIGKILL)
            yield result

    _federate(run, with_a_kill)
    assert len(killed) == 2
    assert_like(undisturbed, run.path)


def _deadly(devices: SimulatedDevices, names: Sequence[str], question: Any) -> Any:
    """The job that answers a server, until it meets one of the devices."""
    if NAMES[3] in names:
        os.kill(os.getpid(), signal.SIGKILL)
    return released(devices, names, question)


@pytest.mark.slow
def test_a_device_that_kills_its_processes_is_named_and_nothing_is_lost(undisturbed: Path, tmp_path: Path) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find tests
    run = create(tmp_path / "run", quick("ray.actors=2", "cohort_size=1"))
    devices = load_devices(run)
    with open_workers(run, devices, run_devices_of_worker) as fleet:
        scheduler = Scheduler(fleet, devices)
        grid = CohortGrid(lambda _, *rest: scheduler.map(_deadly, *rest), devices.schema, NAMES)
        with pytest.raises(RunError, match=f"4 processes were lost over the devices {NAMES[3]} … {NAMES[3]}"):
            federate_run(run, grid, scheduler)
    assert charged(run.path) == {name: [1] for name in NAMES if name != NAMES[3]}
    run_experiment(quick("cohort_size=1"), run.path, resuming=True)  # in this process
    assert_like(undisturbed, run.path)


@pytest.mark.slow
def test_a_node_that_is_gone_with_its_disk_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """Two real nodes of one CPU, each with a disk of its own; the run's folder is on one that both see."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    disk = Path(mkdtemp())  # short: sockets are in it
    node, gone = cluster.add_node(num_cpus=1, temp_dir=str(disk)), list[str]()
    try:
        config = quick("ray.actors=2", "cohort_size=1", f"ray.address={cluster.address}")
        run = create(tmp_path / "run", config)

        def with_a_node_lost(fleet: Workers, results: Iterator[Any]) -> Iterator[Any]:
            for result in results:
                if not gone:
                    gone.append(node.node_id)
                    assert list(disk.rglob("worker-*"))  # it was at work there
                    cluster.remove_node(node, allow_graceful=False)
                    shutil.rmtree(disk)
                yield result

        _federate(run, with_a_node_lost)
    finally:
        cluster.shutdown()
    assert gone
    assert_like(undisturbed, run.path)


def _named(devices: SimulatedDevices, names: Sequence[str], size: int) -> tuple[str, bytes]:
    """Of a size that stays in the store of the node on which it was made."""
    if names == ("broken",):
        raise ValueError("a job's own error")
    return names[0], bytes(size)


@pytest.mark.slow
def test_results_that_are_lost_with_their_node_are_made_again(tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find tests
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    cohorts = [Cohort((f"c{k}",), k % 2) for k in range(6)]
    try:
        run = create(tmp_path / "run", quick("ray.actors=2", f"ray.address={cluster.address}"))
        with open_workers(run, load_devices(run), run_devices_of_worker) as fleet:
            with pytest.raises(ValueError, match="own error"):
                list(fleet.map(_named, [Cohort(("broken",)), *cohorts], 10))
            results = fleet.map(_named, cohorts, 2_000_000)
            found = [next(results)]
            time.sleep(1)  # the other process has its next result ready
            cluster.remove_node(node, allow_graceful=False)
            found += results
    finally:
        cluster.shutdown()
    assert sorted(result[0] for _, result in found) == [f"c{k}" for k in range(6)]
    assert all(len(result[1]) == 2_000_000 for _, result in found)


@contextmanager
def _command(folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command, as a shell's foreground job."""
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [*COMMAND, *more], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heard
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], limit_s: float = 240) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.02)
    return found


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All that this one has started, and what those have."""
    return psutil.Process(process.pid).children(recursive=True)


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray's processes with devices in them."""
    return [p for p in _family(process) if _name(p).startswith("ray::Worker")]


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:  # it has ended meanwhile
        return ""


def _has_paid(run: Path) -> bool:
    try:
        return bool(ledgers(run))
    except sqlite3.OperationalError:  # it is being made
        return False


@pytest.mark.slow
def test_actor_and_driver_may_both_be_killed(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quick"
    with _command(tmp_path, "ray.actors=1", "cohort_size=1") as process:
        _wait_for(lambda: _has_paid(run), process)
        first = _wait_for(lambda: _workers(process), process)
        os.kill(first[0].pid, signal.SIGKILL)
        _wait_for((run / "server" / "00001.safetensors").exists, process)  # another has done its work
        workers = _workers(process)
        os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert workers and not alive  # nobody writes to what is resumed
    again = subprocess.run([*COMMAND, "ray.actors=1", "cohort_size=1", "--resume"], cwd=tmp_path, capture_output=True)
    assert again.returncode == 0, again.stdout
    assert_like(undisturbed, run)


@pytest.mark.slow
def test_ctrl_c_twice_ends_soon_and_leaves_no_process(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quick"
    with _command(tmp_path, "ray.actors=2") as process:
        _wait_for(lambda: _has_paid(run), process)
        family, began = _family(process), time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert process.returncode in (130, -signal.SIGINT), said  # the second may come when Python itself is ending
    assert "go on with --resume" in " ".join(said.split()), said
    assert "Traceback" not in said, said
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive
    kept = ledgers(run)
    run_experiment(quick(), run, resuming=True)  # in this process
    assert_like(undisturbed, run)
    assert set(kept) <= set(ledgers(run))


def test_the_benchmark_of_scale_comes_to_its_end(tmp_path: Path) -> None:
    """Twenty devices, of which two a round do everything but train; a population that has an end."""
    assert len(list(Nobody(3))) == 3
    ended = ours(20, 0, tmp_path)
    assert len(ended) == ROUNDS and ended == sorted(ended)
    rounds = list(RunFolder(tmp_path / "run").events_of(RoundEnd))
    assert [(r.devices, r.releases) for r in rounds] == [(2, 2)] * ROUNDS
