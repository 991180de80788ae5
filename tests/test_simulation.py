"""Whole experiments, small: what a run leaves, resuming, engines, and what a user may get wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load_file

from florilegium.client.calibration import planned_event
from florilegium.client.flower_replies import answer
from florilegium.privacy.accounting import BudgetError
from florilegium.privacy.plan import RoundPlan
from florilegium.server.release_collector import to_arrays
from florilegium.simulation import experiment
from florilegium.simulation.cli.main import main
from florilegium.simulation.config import ExperimentConfig, load_config, with_absolute_paths
from florilegium.simulation.data import population
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.population import Bootstrapped, DataConfig, load_population
from florilegium.simulation.devices.inputs import differing, hashes, people_sha256
from florilegium.simulation.devices.owners import who, write_who
from florilegium.simulation.devices.people import device_name
from florilegium.simulation.devices.simulated import SimulatedDevices, load_devices
from florilegium.simulation.experiment import run_experiment
from florilegium.simulation.runs.changes import check
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import Change, DeviceRound, Evaluation, RoundEnd
from florilegium.simulation.runs.folder import RunFolder, create, find_run, resume
from florilegium.simulation.runs.progress import RunProgress
from florilegium.simulation.runs.provenance import check_sources
from florilegium.simulation.settings import ConfigError, dump_config, find_config

ARMS = {"base", "shared", "local", "personal", "shuffled", "pooled"}
FINISHED = (*SMALL, "name=small", "server.optimizer=fedavgm")


def adapters(run: Path) -> dict[str, dict[str, np.ndarray]]:
    found = sorted((run / "adapters").rglob("adapter_model.safetensors"))
    return {str(p.relative_to(run)): load_file(p) for p in found}


def assert_same_adapters(one: Path, other: Path, *, rounding: bool = False, count: int = 4) -> None:
    """Bit for bit; with `rounding` the shared adapter to 1e-5 and a personal one to 1 % of its norm.

    Adam divides a gradient by its size, so that where both are next to nothing rounding can turn a step round.
    """
    ours, theirs = adapters(one), adapters(other)
    assert ours.keys() == theirs.keys() and len(ours) == count
    for path, tensors in ours.items():
        mine, yours = (np.concatenate([t[k].ravel() for k in sorted(tensors)]) for t in (tensors, theirs[path]))
        allowed = 1e-5 if "shared" in path else 0.01 * float(np.linalg.norm(mine))
        assert float(np.linalg.norm(mine - yours)) <= (allowed if rounding else 0), path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three devices and two rounds, whose server remembers something between them."""
    path = tmp_path_factory.mktemp("runs") / "small"
    run_experiment(load_config(find_config("quickstart"), FINISHED), path)
    return path


WIDTHS = 44, 60, 80, 200


def test_the_table_at_the_end_is_whole(finished: Path) -> None:
    """No figure is cut, however narrow the terminal; and what an encoding lacks is written in other characters."""
    summary = json.loads((finished / "summary.json").read_text())
    probe = (
        "import sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from florilegium.client.terminal import speak_plainly\n"
        "from florilegium.simulation.runs.summary import read_summary\n"
        "from florilegium.simulation.reports.terminal import render_summary\nspeak_plainly()\n"
        "summary = read_summary(Path(sys.argv[1]))\n"
        "for width in sys.argv[2:]:\n    Console(width=int(width)).print(render_summary(summary))\n    print('=====')"
    )
    command = [sys.executable, "-c", probe, str(finished), *map(str, WIDTHS)]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *tables, _ = done.stdout.split("=====\n")
    assert len(tables) == len(WIDTHS)
    for table in tables:
        for figures in summary["nll"].values():
            low, high = figures["ci95"]
            assert f"{figures['mean_per_user']:.3f} +/- {(high - low) / 2:.3f}" in table
            assert f"{figures['mean_per_query']:.3f}" in table
        assert table.count("...") == len(summary["comparisons"])  # of intervals, none of what was cut
        assert f"epsilon = {summary['epsilon']:.2f}" in " ".join(table.split())


# -- what a run leaves --------------------------------------------------------------------------------------------


def test_the_summary_has_what_programs_rely_on(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["devices"], summary["rounds"], summary["seed"], summary["model"]) == (3, 2, 0, "nano")
    for metric in ("nll", "rouge1"):
        assert set(summary[metric]) == ARMS
        for figures in summary[metric].values():
            assert set(figures) == {"mean_per_user", "mean_per_query", "ci95"}
            assert figures["ci95"][0] <= figures["mean_per_user"] <= figures["ci95"][1]
    assert 7.9 < summary["epsilon"] <= 8.0 and summary["delta"] == 1e-5
    assert 0 < summary["epsilon_of_mean"] < summary["epsilon"] and summary["fewest_releases"] == 3
    assert summary["privacy_unit"] == "one dialogue (a prompt and its reply)"
    assert summary["upload_bytes_per_release"] == 4 * 4 * 192 * 4  # float32, layers, outputs, rank
    assert summary["download_bytes_per_round"] == 2 * summary["upload_bytes_per_release"]
    assert len(summary["signal_to_noise"]) == 2
    assert 0 < summary["acceptance_rate"] < 1
    assert summary["people"] == 3 and summary["held_out"] == 3 * 2 and 0 <= summary["held_out_met"] <= 6
    for key in ("annotations_per_device", "wall_s", "peak_rss_bytes", "tokens_trained"):
        assert summary[key] > 0


def test_a_run_leaves_its_files(finished: Path) -> None:
    assert ExperimentConfig.model_validate(RunFolder(finished).config.model_dump()) == RunFolder(finished).config
    results = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert {(r["device"], r["arm"]) for r in results} == {(f"device-0000{k}", a) for k in range(3) for a in ARMS}
    assert "<html" in (finished / "report.html").read_text()
    assert len(adapters(finished)) == 4


def test_the_shuffled_arm_gives_nobody_the_own_adapter(finished: Path) -> None:
    results = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    nll = {(r["device"], r["arm"]): r["nll"] for r in results}
    assert all(nll[d, "shuffled"] != nll[d, "personal"] for d, _ in nll)


def test_only_noised_adapters_of_the_schema_cross_to_the_server(small: ExperimentConfig, tmp_path: Path) -> None:
    """Every byte of every reply belongs to a header of public values or to the agreed arrays."""
    devices = load_devices(create(tmp_path / "run", small))
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    received = devices.schema.split(np.zeros(devices.context.shared_layout.width, dtype=np.float32))
    arrays = to_arrays(received)
    plan = ConfigRecord({"round": 1, "version": 0, "head": ""})
    names = [device_name(k) for k in range(3)]
    content = RecordDict({"arrays": arrays, "plan": plan})
    asked = [Message(content, dst_node_id=k + 1, message_type="train") for k in range(3)]
    for reply in answer(asked, names, devices):
        header = dict(reply.content.config_records["header"])
        assert (header.pop("protocol"), header.pop("version"), list(header)) == (1, 0, ["head"])
        assert set(reply.content) == {"header", "arrays"}
        devices.schema.check({k: v.numpy() for k, v in reply.content.array_records["arrays"].items()})
    bad = Message(RecordDict({"arrays": arrays}), dst_node_id=1, message_type="train")
    assert dict(answer([bad], names[:1], devices)[0].content.config_records["header"]) == {"error": "bad-message"}


def releases_of(devices: SimulatedDevices, name: str) -> int:
    """How many the ledger has paid for."""
    account = devices.context.accounts.account(name, devices.state(name).genesis)
    assert account
    return len(account.entries)


def test_a_server_cannot_ask_twice_with_another_adapter(small: ExperimentConfig, tmp_path: Path) -> None:
    """The same noise on two adapters would cancel; and no order of asking gives a device a new budget."""
    devices = load_devices(create(tmp_path / "run", small))
    zero = torch.zeros(devices.context.shared_layout.width)
    names = list(devices.users)[:1]
    (first,) = devices.contribute(names, zero, RoundPlan(1, 0))
    (again,) = devices.contribute(names, zero, RoundPlan(1, 0))
    assert first is not None and again is not None
    assert all(np.array_equal(first.arrays[k], again.arrays[k]) for k in first.arrays)
    assert devices.contribute(names, zero + 1, RoundPlan(1, 0)) == [None]
    devices.adopt(names, zero, RoundPlan(1, 1))
    assert devices.contribute(names, zero, RoundPlan(2, 1))[0] is not None
    devices.adopt(names, zero, RoundPlan(2, 2))
    for number in (-1, 0, 1, 3, 100_000):
        assert devices.contribute(names, zero, RoundPlan(number, number - 1)) == [None]
    assert releases_of(devices, names[0]) == 2


def test_a_release_is_repeated_bit_by_bit_in_any_company(small: ExperimentConfig, tmp_path: Path) -> None:
    """Computed again beside other devices it would be rounded otherwise, under the same noise."""
    devices = load_devices(create(tmp_path / "run", small))
    received = 0.05 * torch.randn(devices.context.shared_layout.width, generator=torch.Generator().manual_seed(0))
    together = devices.contribute(list(devices.users), received, RoundPlan(1, 0))
    for name, first in zip(devices.users, together, strict=True):
        (alone,) = devices.contribute([name], received, RoundPlan(1, 0))
        assert first is not None and alone is not None and first.head == alone.head
        assert all(np.array_equal(first.arrays[k], alone.arrays[k]) for k in first.arrays)


def test_an_aggregate_is_stored_before_any_device_has_it(
    small: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made again of other releases it would show the server's noise: a resumed round takes the stored one."""
    central = small.model_copy(update={"privacy": small.privacy.model_copy(update={"mode": "user-central"})})
    monkeypatch.setattr(SimulatedDevices, "adopt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(central, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    stored = run.aggregate(1)
    assert stored and stored.facts["releases"] == 3 and set(stored.heads) == {device_name(k) for k in range(3)}
    monkeypatch.undo()
    monkeypatch.setattr(SimulatedDevices, "contribute", _only_later_rounds(SimulatedDevices.contribute))
    run_experiment(central, tmp_path / "run", resuming=True)
    (first,) = [e for e in run.events_of(RoundEnd) if e.round == 1]
    assert first.releases == 3
    last = run.last_shared()
    assert last and last.round == 2 and last.heads == {n: load_devices(run).state(n).head for n in last.heads}


def _only_later_rounds(contribute: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self: SimulatedDevices, names: list[str], received: torch.Tensor, plan: RoundPlan) -> Any:
        assert plan.round > 1, "the devices were asked again for a round whose aggregate is stored"
        return contribute(self, names, received, plan)

    return checked


def test_an_old_copy_of_the_ledger_ends_a_devices_releases(small: ExperimentConfig, tmp_path: Path) -> None:
    """The device's other state and the server both remember a head that the copy does not hold."""
    devices = load_devices(create(tmp_path / "run", small))
    names, zero = list(devices.users), torch.zeros(devices.context.shared_layout.width)
    sent = devices.contribute(names, zero, RoundPlan(1, 0))
    devices.adopt(names, zero, RoundPlan(1, 1))
    for path in (tmp_path / "run").rglob("ledger.db*"):
        path.unlink()
    again = load_devices(RunFolder(devices.run.path))
    assert again.contribute(names, zero, RoundPlan(2, 1)) == [None] * 3
    assert again.observations(names[:1], 2)[names[0]].refusal == "ledger-missing"
    heads = {n: r.head for n, r in zip(names, sent, strict=True) if r}
    fresh = load_devices(create(tmp_path / "other", small))  # the device's own memory is gone too: the server's is left
    assert fresh.contribute(names, zero, RoundPlan(1, 0, heads)) == [None] * 3


def test_the_servers_noise_is_not_that_of_the_seed_if_secrets_are_the_systems(
    small: ExperimentConfig, tmp_path: Path
) -> None:
    one, two = (create(tmp_path / name, small).server_secret() for name in ("one", "two"))
    assert one != two and RunFolder(tmp_path / "one").server_secret() == one
    assert (tmp_path / "one" / "server" / "secret").stat().st_mode & 0o077 == 0


def test_a_device_that_sits_rounds_out_keeps_its_state(small: ExperimentConfig, tmp_path: Path) -> None:
    config = small.model_copy(update={"rounds": 4})
    devices = load_devices(create(tmp_path / "run", config))
    zero = torch.zeros(devices.context.shared_layout.width)
    names = list(devices.users)[:1]
    for number in (1, 4):  # not sampled in between
        assert devices.contribute(names, zero, RoundPlan(number, number - 1))[0] is not None
        devices.adopt(names, zero, RoundPlan(number, number))
    assert devices.contribute(names, zero, RoundPlan(4, 3))[0] is not None  # a killed driver asks again
    assert releases_of(devices, names[0]) == 2


def test_secrets_from_the_operating_system_differ_between_runs(small: ExperimentConfig, tmp_path: Path) -> None:
    secret = small.privacy.model_copy(update={"secret": "os"})
    drawn = []
    for name in ("a", "b"):
        devices = load_devices(create(tmp_path / name, small.model_copy(update={"privacy": secret})))
        zero = torch.zeros(devices.context.shared_layout.width)
        first, again = (devices.contribute(["device-00000"], zero, RoundPlan(1, 0))[0] for _ in range(2))
        assert first is not None and again is not None
        assert all(np.array_equal(first.arrays[k], again.arrays[k]) for k in first.arrays)  # asked again, the same
        drawn.append(np.concatenate([a.ravel() for a in first.arrays.values()]))
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.5


# -- stopping and going on ----------------------------------------------------------------------------------------


def test_a_run_stopped_in_round_two_ends_like_one_that_was_not(finished: Path, tmp_path: Path) -> None:
    config = RunFolder(finished).config
    progress = RunProgress()

    def stop_in_round_two() -> None:
        if progress.phase == "learn_shared" and progress.round == 1:
            raise KeyboardInterrupt

    progress.changed = stop_in_round_two
    with pytest.raises(KeyboardInterrupt, match=r"what was finished is kept in .*run: go on with --resume"):
        run_experiment(config, tmp_path / "run", progress=progress)
    assert "<html" in (tmp_path / "run" / "report.html").read_text()  # what was finished can be read
    run_experiment(config, tmp_path / "run", resuming=True)
    assert_same_adapters(finished, tmp_path / "run")
    ours, theirs = (json.loads((p / "summary.json").read_text()) for p in (finished, tmp_path / "run"))
    different = {"wall_s", "wall_by_phase_s", "peak_rss_bytes"}
    assert {k: v for k, v in ours.items() if k not in different} == {
        k: v for k, v in theirs.items() if k not in different
    }


@pytest.mark.slow
def test_a_killed_process_resumes(finished: Path, tmp_path: Path) -> None:
    """kill -9 after the first round, by the command line, from a folder with a foreign client.py."""
    (tmp_path / "client.py").write_text("raise SystemExit('a foreign client.py was imported')")
    command = [Path(sys.executable).parent / "florilegium", "run", "quickstart", *FINISHED]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "runs" / "small" / "server" / "00001.safetensors"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert checkpoint.exists() and not (tmp_path / "runs" / "small" / "summary.json").exists()
    again = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout
    assert "personal − base" in again.stdout
    assert "small: round 2 of 2, 3 devices" in again.stdout  # nobody watches: it is a log
    assert_same_adapters(finished, tmp_path / "runs" / "small")


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_finished(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "florilegium", "run", "quickstart", *SMALL, "name=small"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
    checkpoint = tmp_path / "runs" / "small" / "server" / "00000.safetensors"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 130 and "go on with --resume" in " ".join(said.split())
    assert "<html" in (tmp_path / "runs" / "small" / "report.html").read_text()


def write_chats(path: Path, film: str = "the long one") -> Path:
    """Four people with twelve replies each."""
    said = [
        {
            "user": f"u{k}",
            "time": f"2026-03-{t + 1:02d}T10:00:00",
            "prompt": f"film {t}?",
            "response": f"{film} {k * t}",
        }
        for k in range(4)
        for t in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in said))
    return path


OF_CHATS = ("rounds=1", "data.users=2", "data.split=all", "data.min_pairs=4", "evaluation.rouge_queries_per_user=0")


@pytest.fixture(scope="module")
def of_chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a file, its data beside it."""
    folder = tmp_path_factory.mktemp("chats")
    data = f"data.name={write_chats(folder / 'chats.jsonl')}"
    config = load_config(
        find_config("quickstart"), [*SMALL, *OF_CHATS, data, "evaluation.every_round=true", "name=run"]
    )
    run_experiment(config, folder / "run")
    return folder


def copied(of_chats: Path, tmp_path: Path) -> RunFolder:
    """The same run, to be gone on with: over the same file."""
    return RunFolder(Path(shutil.copytree(of_chats / "run", tmp_path / "run")))


def test_a_run_whose_data_was_changed_does_not_go_on(of_chats: Path, tmp_path: Path) -> None:
    run = copied(of_chats, tmp_path)
    before = (run.path / "metrics.jsonl").read_bytes()
    write_chats(of_chats / "chats.jsonl", film="a short one")
    try:
        with pytest.raises(RunError, match=r"what has changed is what its devices see .*chats\.jsonl"):
            run_experiment(run.config, run.path, resuming=True)
        with pytest.raises(RunError, match="old and new would be mixed"):  # as in a worker
            load_devices(run)
    finally:
        write_chats(of_chats / "chats.jsonl")
    assert (run.path / "metrics.jsonl").read_bytes() == before
    run_experiment(run.config, run.path, resuming=True)


def test_whatever_a_run_reads_has_a_hash(of_chats: Path) -> None:
    config, noted = RunFolder(of_chats / "run").config, json.loads((of_chats / "run" / "inputs.json").read_text())
    people = load_population(config.data, config.seed)
    read = ["read as JSON Lines of user, prompt and response: 48 conversations"]
    assert {**hashes(config, people), "read": read} == noted
    other = config.model_copy(update={"selection": config.selection.model_copy(update={"lexicons": ("medical",)})})
    assert differing(noted, hashes(other, people)) == ["lexicons"]
    first, *rest = people
    for changed in (replace(first, held_out=first.held_out[:-1]), replace(first, stream=first.stream[::-1])):
        assert differing(noted, hashes(config, [changed, *rest])) == ["people"]
    assert people_sha256(people, 1) == people_sha256(people[:1], 1)  # who comes later does not matter


def test_of_resampled_devices_the_people_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    people = load_population(DataConfig(users=2, split="development"), seed=0)
    monkeypatch.setattr(population, "resampled", lambda *_: pytest.fail("a device was made"))
    found = {people_sha256(Bootstrapped(people, n, seed), n) for n, seed in ((100_000, 0), (100_001, 0), (100_000, 1))}
    assert len(found) == 3
    assert people_sha256(Bootstrapped(people[:1], 5, 0), 5) != people_sha256(Bootstrapped(people, 5, 0), 5)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError("No space left on device")])
def test_only_what_was_finished_is_said_to_be_kept(
    of_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    run, progress = copied(of_chats, tmp_path), RunProgress()
    kind, before = KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else RunError, (run.path / "metrics.jsonl")
    text = before.read_bytes()

    def stopped(*_: object) -> None:
        raise stop

    with monkeypatch.context() as patched, pytest.raises(kind, match=r"nothing was begun: .*run is as it was before"):
        patched.setattr(experiment, "load_run_devices", stopped)
        run_experiment(run.config, run.path, overwrite=True)
    assert before.read_bytes() == text

    def stopped_before_round_one() -> None:
        if progress.phase == "evaluate":
            raise stop

    progress.changed = stopped_before_round_one
    with pytest.raises(kind, match=r"no round was finished: .*run begins anew with --resume"):
        run_experiment(run.config, run.path, overwrite=True, progress=progress)
    run_experiment(run.config, run.path, resuming=True)
    progress.changed, progress.phase = stopped_before_round_one, "loading"
    with pytest.raises(kind, match=r"what was finished is kept in .*run: go on with --resume"):
        run_experiment(run.config, run.path, resuming=True, progress=progress)


def test_a_runs_folder_is_enough_to_go_on(of_chats: Path, tmp_path: Path) -> None:
    run = copied(of_chats, tmp_path)
    assert find_run(str(run.path), [], tmp_path / "elsewhere", resuming=True) == (run.config, run.path)
    command = [Path(sys.executable).parent / "florilegium", "run", "--resume", "run", "evaluation.replies_shown=1"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout
    assert run.path.name == "run" and not (tmp_path / "runs").exists()
    assert (
        "evaluation.replies_shown: 6 → 1"
        in json.loads((run.path / "summary.json").read_text())["changed"][0]["settings"]
    )
    with pytest.raises(RunError, match="is a run: go on with --resume"):
        find_run(str(run.path), [], tmp_path, resuming=False)
    with pytest.raises(ConfigError, match="is no file nor one of"):
        find_run(str(tmp_path), [], tmp_path, resuming=True)


def test_a_finished_run_is_given_more_rounds(of_chats: Path, tmp_path: Path) -> None:
    """What is done stays what it was, the budget too; the curve has one point more."""
    run = copied(of_chats, tmp_path)
    before = [e for e in run.events() if isinstance(e, RoundEnd | DeviceRound)]
    curve = {e.arm: e.mean_per_user for e in run.events_of(Evaluation) if e.final}
    more = load_config(run.path / "config.toml", ["rounds=2", "privacy.releases=1"])
    summary = run_experiment(more, run.path, resuming=True)
    events = list(run.events())
    assert [e for e in events if isinstance(e, RoundEnd | DeviceRound) and e.round == 1] == before
    evaluations = [e for e in events if isinstance(e, Evaluation)]
    points = [(e.round, e.final, e.arm) for e in evaluations]
    arms = ("base", "shared", "local", "personal", "shuffled")
    assert points == [(0, False, "base"), *((1, False, a) for a in arms), *((2, True, a) for a in (*arms, "pooled"))]
    assert {e.arm: e.mean_per_user for e in evaluations if e.round == 1}.items() <= curve.items()
    assert summary.rounds == 2 and summary.epsilon <= 8
    assert summary.changed == (Change(after_round=1, settings="privacy.releases: 0 → 1, rounds: 1 → 2"),)
    last = [e for e in events if isinstance(e, DeviceRound) and e.round == 2]
    assert {(e.arrived, e.refusal) for e in last} == {(0, "budget-spent")}  # nothing is left to meet or to spend


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["rounds=3"], r"rounds: 2 → 3: the noise of the rounds that are done .* add privacy.releases=2"),
        (["rounds=1"], r"rounds: 2 → 1: 2 rounds are done"),
        (["evaluation.users=2"], r"evaluation.users: 0 → 2 cannot be changed after a round"),
        (["privacy.releases=2"], r"privacy.releases: 0 → 2\); resume with the same"),
        (["name=other", "ray.actors=1"], r"\(name: 'small' → 'other'\); resume"),
        (["privacy.epsilon=9", "rounds=3"], r"privacy.epsilon: 8.0 → 9"),
    ],
)
def test_what_would_change_finished_rounds_is_refused(finished: Path, overrides: list[str], why: str) -> None:
    before = (finished / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match=why):
        resume(finished, load_config(finished / "config.toml", overrides))
    assert (finished / "config.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("begun", "done", "why"),
    [
        (["privacy.mode=none"], 2, ""),
        (["server.rule=none"], 2, ""),
        (["privacy.releases=2"], 2, ""),  # no more releases than were planned
        (["privacy.mode=none"], 1, "1 of 2 rounds are done"),
        (["privacy.mode=none", "evaluation.users=2"], 2, "which devices are evaluated"),
        (["privacy.mode=none", "world.classes=world/devices"], 2, "how long the devices"),
        (["privacy.mode=user-central", "privacy.delta=1e-5"], 2, "the noise"),
    ],
)
def test_more_rounds_are_had_where_they_change_none_that_is_done(begun: list[str], done: int, why: str) -> None:
    before = load_config(find_config("quickstart"), [*SMALL, *begun])
    after = load_config(find_config("quickstart"), [*SMALL, *begun, "rounds=4"])
    if not why:
        return check(before, after, done, "here")
    with pytest.raises(ConfigError, match=why):
        check(before, after, done, "here")


def test_cohorts_of_one_give_the_same_run(finished: Path, tmp_path: Path) -> None:
    config = RunFolder(finished).config.model_copy(update={"cohort_size": 1})
    run_experiment(config, tmp_path / "run")
    assert_same_adapters(finished, tmp_path / "run", rounding=True)


@pytest.mark.slow
def test_flowers_own_engine_gives_the_same_aggregate(finished: Path, tmp_path: Path) -> None:
    """A message a device, Ray actors; started where a foreign client.py lies."""
    (tmp_path / "client.py").write_text("raise SystemExit('a foreign client.py was imported')")
    command = [Path(sys.executable).parent / "florilegium", "run", "quickstart", *FINISHED, "engine=flower"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_adapters(finished, tmp_path / "runs" / "small", rounding=True)


@pytest.mark.slow
def test_the_pipeline_on_a_real_instruct_model(tmp_path: Path) -> None:
    """smollm2-135m, four devices; every stage leaves its traces."""
    from florilegium.client.lm.places import ModelError, resolve

    try:
        resolve("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    settings = [
        *SMALL,
        "data.users=4",
        "model.name=smollm2-135m",
        "data.max_pairs=24",
        "data.min_pairs=24",
        "personal.learning_rate=5e-4",
    ]
    tiny = ["selection.bins=4", "shared.pool_capacity=8", "evaluation.pooled_epochs=0", "name=smollm2"]
    summary = run_experiment(load_config(find_config("quickstart"), [*settings, *tiny]), tmp_path / "run")
    assert summary.model == "smollm2-135m" and summary.devices == 4
    assert summary.synthetic_kept + summary.synthetic_rejected > 0
    assert summary.nll["personal"].mean_per_user != summary.nll["base"].mean_per_user
    assert summary.upload_bytes_per_release == 4 * 30 * 4 * 192  # float32, layers, rank, key-value outputs


def test_whose_a_device_is_is_told_to_who_asks_and_stands_nowhere(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    users = [user.id for user in load_population(RunFolder(finished).config.data, seed=0)]

    def asked(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["florilegium", "data", "who", str(finished), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    assert asked().splitlines() == [f"device-0000{k}  {users[k]}" for k in range(3)]
    assert asked("device-00002") == f"device-00002  {users[2]}\n"
    assert asked("--out", str(tmp_path / "who.json")) == ""
    assert json.loads((tmp_path / "who.json").read_text()) == {f"device-0000{k}": users[k] for k in range(3)}
    assert (tmp_path / "who.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(RunError, match=r"who\.json exists"):
        write_who(tmp_path / "who.json", {})
    with pytest.raises(RunError, match=r"'device-7' is no device of .* device-00000 to device-00002"):
        who(RunFolder(finished), ["device-7"])
    for path in (p for p in finished.rglob("*") if p.is_file()):
        assert not any(user.encode() in path.read_bytes() for user in users), path


# -- a user's mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("personal.lerning_rate=1", r"personal: unknown key 'lerning_rate'; did you mean 'learning_rate'\?"),
        ("rounds=0", r"rounds = 0: .*greater than or equal to 1"),
        ("rounds=many", r"rounds = 'many': .*valid integer"),
        ("privacy.epsilon=-1", r"privacy.epsilon = -1: .*greater than 0"),
        ("privacy.epsilon=inf", r"privacy.epsilon = inf: .*finite"),
        ("privacy.epsilon=0", r"privacy.epsilon = 0: .*greater than 0"),
        ("privacy.epsilon=1e6", r"privacy.epsilon = 1000000.0: .*less than or equal to 100"),
        ("data.context_turns=2", "a reply would be in the prompts of those after it"),
        ("privacy.delta=2e-4", r"privacy.delta = 0.0002 must be < 1 / n = 0.0002 \(64 devices of 80 dialogues\)"),
        ("privacy.accountant=gdp", r"gdp approximates by a limit theorem and reports less than is spent; 'pld'"),
        ("privacy.accountant=magic", r"magic is not known; 'pld'"),
        ("privacy.mode=user", r"privacy.mode = 'user': .*example-local"),
        ("shared.sampling=shuffle", r"must be 'poisson': shuffled .* overstate privacy"),
        ("shared.source=buffer", r"'quality' keeps depends on the data.*user-\*"),
        ("shared.adapter.use_dora=true", r"unknown key 'use_dora'; DoRA .*use LoRA"),
        ("shared.adapter.use_rslora=true", r"unknown key 'use_rslora'; .*set alpha to alpha · √rank"),
        ("personal.adapter.lora_dropout=0.1", r"unknown key 'lora_dropout'; adapters have no dropout here"),
        ("personal.adapter.r=8", r"unknown key 'r'; it is called 'rank' here"),
        ("personal.adapter.lora_alpha=8", r"unknown key 'lora_alpha'; it is called 'alpha' here"),
        ("personal.adapter.target_modules=q_proj", r"unknown key 'target_modules'; it is called 'targets' here"),
        ("workers=0", r"workers = 0: Input should be greater than or equal to 1 or be 'auto'$"),
        ("ray.address=foo", r"ray\.address = 'foo': must be HOST:PORT, ray://HOST:PORT or auto"),
        ("personal.lr=1", r"personal: unknown key 'lr'; it is called 'learning_rate' here"),
        ("rank=8", r"unknown key 'rank'; did you mean shared.adapter.rank or personal.adapter.rank\?"),
        ("num_clients=8", r"unknown key 'num_clients'; it is called data.users here"),
        ("personal.adapter.targets=3", r"targets = 3: must be a list"),
        (
            "personal.adapter.targets=[q_proj]",
            r"texts of a list stand in quotes, on a command line '\[\"one\", \"two\"\]'",
        ),
        ("model.dtype=fp16", r"model.dtype = 'fp16': what float16 cannot hold .* use 'bfloat16', 'float32' or 'auto'"),
        ("model.dtype=int4", r"model.dtype = 'int4': Input should be 'auto', 'float32' or 'bfloat16'"),
        ("model.device=mps", r"model.device = 'mps': .*Apple's GPUs; use 'cpu'"),
        ("model.device=gpu", r"model.device = 'gpu': must be 'auto', 'cpu', 'cuda' or, as an example, 'cuda:1'"),
        ("model.device=1", r"model.device = 1: must be a text; in quotes"),
        ("model=nano", r"model = 'nano': is a section, not a value; it has the settings name, dtype"),
        ("evaluation.every_round=maybe", r"every_round = 'maybe': must be true or false"),
        ("data.hub_fields.prompt=''", r"data.hub_fields.prompt = '': must not be empty"),
        ("selection.lexicons=mine", r"selection.lexicons = 'mine': must be one of general, medical"),
        (r'data.name="C:\Users\x.jsonl"', r"a backslash begins an escape: write a path in '…' or with /"),
        (f"rounds={10**400}", r"rounds=1000\S*…: top level: rounds is a whole number of more than 64 bits"),
        ("seed=1" + "0" * 5000, r"override 'seed=1000.*…: Exceeds the limit \(4300 digits\)"),
        ("seed=" + "[" * 100_000, r"override 'seed=\[.*…: nested too deeply"),
        ("shared.adapter.targets=['embed_tokens']", r"embed_tokens is an embedding: .*linear layers"),
        ("server.noise_bands=2", r"noise_bands = 2 needs privacy.mode = 'user-central'"),
        ("selection.policy=qualty", r"selection.policy = 'qualty': .*quality, eoe"),
        ("data.name=chitchta", r"did you mean 'chitchat'"),
        ("name=a/b", "names the run's folder"),
        ("rounds", "must be key=value"),
        ("rounds.x=1", "is a value, not a section"),
    ],
)
def test_a_wrong_setting_is_named(quickstart: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(quickstart, [override])


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("shared.adapter.targets=all-linear", ()),
        ("shared.adapter.targets=['all-linear']", ()),
        ("shared.adapter.targets=q_proj", ("q_proj",)),
        ("shared.adapter.targets=q_proj, v_proj", ("q_proj", "v_proj")),
        ('shared.adapter.targets=["q_proj"]', ("q_proj",)),
        ("model.dtype=bf16", "bfloat16"),
        ("model.dtype=torch.float32", "float32"),
        ("model.device=cuda:1", "cuda:1"),
        (r"model.name='C:\models\mine'", r"C:\models\mine"),
        ("synthesis.instruction={rewrite}: ", "{rewrite}: "),
    ],
)
def test_what_users_of_other_tools_write_is_read(quickstart: Path, override: str, read: Any) -> None:
    found: Any = load_config(quickstart, [override])
    for key in override.partition("=")[0].split("."):
        found = getattr(found, key)
    assert found == read


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'[data]\nname = "C:\\Users\\me"', r"line 2.* write a path in '…' or with /"),
        ("rounds = 1\nname = 'Grün'".encode("latin-1"), r"line 2: is not UTF-8 .*; save the file as UTF-8"),
        ("rounds = 1".encode("utf-16"), r"line 1: is not UTF-8"),
        (b"seed = 1" + b"0" * 5000, r"not valid TOML: Exceeds the limit \(4300 digits\)"),
        (b"seed = " + b"[" * 100_000, r"not valid TOML: nested too deeply"),
    ],
    ids=range(5),
)
def test_what_is_no_toml_is_told_with_its_file(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"mine.toml.*{told}"):
        load_config(tmp_path / "mine.toml")


def test_a_config_from_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes("rounds = 7\r\n[data]\r\nusers = 5\r\n".encode("utf-8-sig"))
    config = load_config(tmp_path / "mine.toml")
    assert (config.rounds, config.data.users) == (7, 5)


def test_processes_in_other_folders_read_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLORILEGIUM_DATA", "sets")
    for name in ("chats.jsonl", "mine.toml", "general"):
        (tmp_path / name).touch()
    named = ["data.name=chats.jsonl", "selection.lexicons=general,mine.toml", "world.classes=world/devices"]
    config = with_absolute_paths(load_config(find_config("quickstart"), named))
    assert config.data.name == str(tmp_path / "chats.jsonl")
    assert config.selection.lexicons == ("general", str(tmp_path / "mine.toml"))
    assert config.world.classes == str(find_config("world/devices").resolve())
    with pytest.raises(RunError, match="no run"):
        run_experiment(config, tmp_path / "run", resuming=True)
    assert os.environ["FLORILEGIUM_DATA"] == str(tmp_path / "sets")


def test_nothing_kept_for_a_shared_adapter_is_told_with_the_way_out(quickstart: Path) -> None:
    with pytest.raises(BudgetError, match=r"shared.pool_capacity = 0 .* or server.rule = 'none'"):
        planned_event(load_config(quickstart, ["shared.pool_capacity=0"]))


def test_correlated_noise_is_calibrated_for_how_often_a_device_takes_part(quickstart: Path) -> None:
    central = ["privacy.mode=user-central", "server.noise_bands=2"]
    with pytest.raises(ConfigError, match=r"privacy.releases = 0 must be 2: .* 3 rounds with server.noise_bands = 2"):
        load_config(quickstart, central)
    assert load_config(quickstart, [*central, "privacy.releases=2"]).server.noise_bands == 2


def test_a_section_given_in_part_keeps_the_other_defaults(quickstart: Path) -> None:
    config = load_config(quickstart, ["shared.adapter.rank=2"])
    assert config.shared.adapter.factors == "b" and config.shared.adapter.rank == 2
    plain = ExperimentConfig.model_validate({"shared": {"adapter": {"targets": ["q_proj"]}}})
    assert plain.shared.adapter.factors == "b" and plain.shared.adapter.rank == 4


def test_a_config_survives_its_own_file(small: ExperimentConfig, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(dump_config(small))
    assert load_config(tmp_path / "c.toml") == small


def test_broken_toml_and_unknown_configs_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    with pytest.raises(ConfigError, match=r"bad.toml: not valid TOML: .*line 1"):
        load_config(tmp_path / "bad.toml")
    for near in ("quickstrat", "Quickstart", "configs/quikstart.toml"):
        with pytest.raises(ConfigError, match=r"is no file; did you mean 'quickstart'\?"):
            find_config(near)
    with pytest.raises(ConfigError, match=r"config 'zzz' is no file nor one of: .*quickstart"):
        find_config("zzz")


def test_a_run_that_exists_is_left_alone(finished: Path, small: ExperimentConfig, tmp_path: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"--resume .* --overwrite"):
        create(finished, small)
    with pytest.raises(ConfigError, match=r"\(seed: 0 → 5\); resume with the same settings"):
        run_experiment(RunFolder(finished).config.model_copy(update={"seed": 5}), finished, resuming=True)
    with pytest.raises(RunError, match="no run to resume"):
        run_experiment(small, tmp_path / "nothing", resuming=True)
    with pytest.raises(RunError, match="exclude each other"):
        run_experiment(small, finished, resuming=True, overwrite=True)
    (tmp_path / "mine.txt").write_text("not a run")
    with pytest.raises(RunError, match="left alone"):
        create(tmp_path, small, overwrite=True)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_has_one_driver(small: ExperimentConfig, tmp_path: Path) -> None:
    progress = RunProgress()

    def run_again() -> None:
        with pytest.raises(RunError, match="in use by another process"):
            run_experiment(small, tmp_path / "run", resuming=True)
        raise KeyboardInterrupt

    progress.changed = run_again
    with pytest.raises(KeyboardInterrupt):
        run_experiment(small, tmp_path / "run", progress=progress)


def test_a_replacement_that_cannot_begin_leaves_the_old_run(
    finished: Path, small: ExperimentConfig, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "small"))
    wrong = small.model_copy(update={"data": small.data.model_copy(update={"users": 2_000})})
    with pytest.raises(DataError, match="set users <="):
        run_experiment(wrong, run, overwrite=True)
    assert (run / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_worker_with_other_code_is_refused(small: ExperimentConfig, tmp_path: Path) -> None:
    run = create(tmp_path / "run", small)
    check_sources(run.path)
    (run.path / "sources.sha256").write_text("0" * 64)
    with pytest.raises(RunError, match="is not the code that started"):
        check_sources(run.path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quickstart", "model.name=nano2"], "did you mean 'nano'"),
        (["run", "quickstart", "data.name=missing.jsonl"], "missing.jsonl"),
        (["run", "quickstart", "data.users=1000"], "set users <="),
        (["run", "quickstart", "personal.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["run", "quickstart", "shared.adapter.targets=['c_attn']"], "c_attn"),
        (["report", "nowhere"], "nowhere"),
        (["data", "describe", "[/b].jsonl"], "[/b].jsonl"),
        (["data", "describe", "chitchat", "split=foo"], "split = 'foo'"),
        (
            ["data", "describe", "chitchat", "hub_fields.users=x"],
            "hub_fields: unknown key 'users'",
        ),
        (["data", "describe", "chitchat", "min_pairs"], "must be key=value"),
        (["data", "who", "nowhere"], "nowhere is not the folder of a run"),
        (["data", "describe", "chitchta"], "did you mean 'chitchat'"),
        (["models", "pull", "nano"], "only smollm2-135m"),
    ],
)
def test_the_command_tells_a_mistake_in_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["florilegium", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr()
    text = " ".join(told.err.split())
    assert "error:" not in told.out
    assert stopped.value.code == 2 and not list(tmp_path.glob("runs/*"))  # the corrected command finds no folder
    assert "error:" in text and message in text
