"""What is left of a command that is told to end, or killed, and of Ray where something is missing: real commands, real
signals, real clusters, looked at by process ids.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import SMALL

from florilegium.simulation.baselines.devices import run_devices_of_worker
from florilegium.simulation.benchmarks.engine_worker import AbsentError, Worker
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.devices.simulated import SimulatedDevices, load_devices
from florilegium.simulation.engines import ray_cluster
from florilegium.simulation.engines.placement import open_workers
from florilegium.simulation.engines.ray_cluster import NOT_STARTED, ClusterError, Wish, _init, _reach, open_cluster
from florilegium.simulation.engines.workers import Cohort
from florilegium.simulation.runs.folder import RunFolder, create
from florilegium.simulation.runs.stopping import end_all
from florilegium.simulation.settings import config_folder

QUICK = (*SMALL, "evaluation.pooled_epochs=0", "evaluation.rouge_queries_per_user=0", "name=quick")
FLORILEGIUM = str(Path(sys.executable).parent / "florilegium")
RUN = [FLORILEGIUM, "run", "quickstart", *QUICK]
ON_FLOWER, ON_ACTORS = [*RUN, "engine=flower"], [*RUN, "ray.actors=1"]
BENCH = [FLORILEGIUM, "bench", "engine", "--kinds", "training", "--devices", "2", "--steps", "1", "--repeats", "99"]
SCALE = [FLORILEGIUM, "bench", "scale", "--devices", ",".join(["3000"] * 20), "--stock-until", "0", "--actors", "1"]
CLIENT, WORKER = "ray::ClientAppActor", "ray::Worker"


@contextmanager
def begun(command: Sequence[str], folder: Path, awaited: str, count: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A command in a group of its own, as a shell's foreground job, when so many of its processes have that name."""
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=heard,
    )  # fmt: skip
    try:
        wait_for(lambda: len(named(process, awaited)) >= count or process.poll() is not None, 240)
        assert process.poll() is None, process.stdout and process.stdout.read()
        yield process
    finally:
        end_all([psutil.Process(process.pid)] if process.poll() is None else [])
        process.wait()


def wait_for(condition: Callable[[], object], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def named(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    found = []
    for each in family(process):
        try:
            found += [each] if name in " ".join(each.cmdline()) else []
        except psutil.Error:
            continue
    return found


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def assert_all_end(processes: Sequence[psutil.Process], limit_s: float = 30) -> None:
    assert processes
    assert wait_for(lambda: not alive(processes), limit_s), alive(processes)


# -- signals ----------------------------------------------------------------------------------------------------------

PARENT = """
import subprocess, sys, time
from florilegium.simulation.runs.stopping import Stopped, stoppable
try:
    with stoppable():
        child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
        subprocess.Popen([sys.executable, "-c", child + "; time.sleep(99)"])
        try:
            time.sleep(99)
        except KeyboardInterrupt:
            if "swallows" in sys.argv:
                raise KeyboardInterrupt from None  # as Ray does
            raise
except Stopped as stopped:
    print("stopped")
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("more", [[], ["swallows"]])
def test_what_a_stopped_process_has_started_ends_with_it(
    number: signal.Signals, more: list[str], tmp_path: Path
) -> None:
    with begun([sys.executable, "-c", PARENT, *more], tmp_path, "time.sleep(99)", 2) as process:
        started = family(process)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert (process.returncode, said) == (128 + number, "stopped\n")
        assert_all_end(started)


def test_nohup_is_left_alone(tmp_path: Path) -> None:
    code = "import signal; from florilegium.simulation.runs.stopping import stoppable\n"
    code += "with stoppable(): signal.raise_signal(1)"
    done = subprocess.run(["nohup", sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_process_that_is_told_to_ends_with_its_parent(tmp_path: Path) -> None:
    child = "import time; from florilegium.simulation.runs.stopping import end_with_parent; "
    child += "end_with_parent(); time.sleep(99)"
    parent = (
        "import os, pathlib, sys; from florilegium.simulation.runs.stopping import run_child;"
        f"run_child([sys.executable, '-c', {child!r}], pathlib.Path.cwd(), os.environ)"
    )
    with begun([sys.executable, "-c", parent], tmp_path, "end_with_parent(); time.sleep") as process:
        started = family(process)
        process.kill()
        assert_all_end(started)


@pytest.mark.slow
def test_a_benchmarks_process_is_ended_whatever_it_does() -> None:
    with pytest.raises(AbsentError, match="ended with exit code 1"):
        Worker("none", "nano", "float32", "cpu")
    worker = Worker("florilegium", "nano", "float32", "cpu")
    os.kill(worker._process.pid or 0, signal.SIGSTOP)
    worker.kill()
    assert worker._process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "awaited", "number"),
    [
        (ON_FLOWER, CLIENT, signal.SIGINT),
        (ON_ACTORS, WORKER, signal.SIGTERM),
        (BENCH, CLIENT, signal.SIGTERM),
        (SCALE, WORKER, signal.SIGINT),
    ],
)
def test_a_stopped_command_leaves_no_process(
    command: list[str], awaited: str, number: signal.Signals, tmp_path: Path
) -> None:
    """Every signal is tried on a process that starts others, above: here each command has its turn with one."""
    with begun(command, tmp_path, awaited) as process:
        time.sleep(3)  # they are in the middle of something
        started = family(process)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, said
        assert (
            len(re.findall(r"^\s*stopped", said, re.MULTILINE)) == 1
            and "Traceback" not in said
            and "*** SIG" not in said
        ), said
        assert_all_end(started)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "awaited"), [(ON_FLOWER, CLIENT), (SCALE, WORKER)])
def test_of_a_killed_command_nothing_is_left_either(command: list[str], awaited: str, tmp_path: Path) -> None:
    """Ray's own agents look every now and then whether theirs is there; all others end at once."""
    with begun(command, tmp_path, awaited) as process:
        started = family(process)
        os.kill(process.pid, signal.SIGKILL)
        assert_all_end(started, limit_s=120)


# -- processes of Flower's simulation ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_client_process_that_is_lost_ends_the_run_and_resume_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quick"
    with begun(ON_FLOWER, tmp_path, CLIENT) as process:
        assert wait_for((run / "server" / "00000.safetensors").exists, 240)  # the first round is on
        os.kill(named(process, CLIENT)[0].pid, signal.SIGKILL)
        started = family(process)
        said = " ".join(process.communicate(timeout=120)[0].split())
        assert process.returncode == 2, said
        assert "of 3 visits were lost after" in said and "go on with --resume" in said, said
        assert "Traceback" not in said and "(raylet)" not in said, said
        assert_all_end(started)
    again = subprocess.run([*ON_FLOWER, "--resume"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "personal − base" in again.stdout
    assert "DEBUG" not in again.stdout + again.stderr and "DEPRECATED" not in again.stdout + again.stderr


# -- Ray that is not there --------------------------------------------------------------------------------------------


def quick(*overrides: str) -> ExperimentConfig:
    return load_config(config_folder() / "quickstart.toml", [*QUICK, *overrides])


def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        for wanted in (address, f"ray://{address}"):
            told = f"'{wanted}': no cluster can be reached"
            with pytest.raises(ClusterError, match=told), open_cluster(tmp_path, Wish(1, 1, 0), wanted):
                pass
    monkeypatch.setattr(ray_cluster, "CONNECT_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        told = "no cluster can be reached there .something else listens there."
        wanted = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ClusterError, match=told), open_cluster(tmp_path, Wish(1, 1, 0), wanted):
            pass
    for wrong in ("nowhere", "host:port", "ray://host"):
        with pytest.raises(ClusterError, match="must be HOST:PORT"), open_cluster(tmp_path, Wish(1, 1, 0), wrong):
            pass


def test_a_folder_too_long_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(ClusterError, match=r"TMPDIR = .*longlong.* is too long"), open_cluster(tmp_path, Wish(1, 1, 0)):
        pass


@pytest.mark.parametrize("told", NOT_STARTED)
def test_a_ray_that_does_not_start_is_told_in_a_line(told: str) -> None:
    """In the words of the version that is installed; what else it raises is a bug of somebody's."""

    def init(**_: object) -> None:
        raise Exception(f"The current node: {told}. This could be anything.\nAnd more.")  # noqa: TRY002  # as Ray does

    spec = find_spec("ray")
    assert spec and spec.origin
    said = Path(spec.origin).with_name("_private").joinpath("node.py").read_text("utf-8")
    assert (told in said) or ("GCS" in told and "Failed to {'start' if self.head else 'connect to'} GCS" in said)
    with pytest.raises(ClusterError) as caught:
        _init(SimpleNamespace(init=init), address="local")
    assert f"Ray did not start: The current node: {told};" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ZeroDivisionError):
        _init(SimpleNamespace(init=lambda **_: 1 / 0), address="local")


@pytest.mark.slow
def test_a_ray_whose_port_is_taken_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        monkeypatch.setenv("RAY_GCS_SERVER_PORT", str(taken.getsockname()[1]))
        told, wish = "Ray did not start: Failed to start GCS", Wish(1, 1, 0)
        with pytest.raises(ClusterError, match=told), open_cluster(tmp_path, wish, cpus=1):
            pass


@pytest.mark.parametrize(
    ("wish", "nodes", "room"),
    [
        (Wish(2, 1, 0), [{"CPU": 2.0}], 2),
        (Wish(2, 1, 0), [{"CPU": 1.0}, {"CPU": 1.5}], 2),
        (Wish(1, 2, 0), [{"CPU": 1.0}, {"CPU": 1.0}], 0),
        (Wish(3, 0.1, 0), [{"CPU": 0.3}], 3),
        (Wish(1, 1, 1), [{"CPU": 8.0}], 0),
        (Wish(4, 1, 0.5), [{"CPU": 8.0, "GPU": 2.0}], 4),
    ],
)
def test_room_is_that_of_whole_processes_on_a_node(wish: Wish, nodes: list[dict[str, float]], room: int) -> None:
    assert sum(wish.fits(node) for node in nodes) == room


@pytest.mark.slow
def test_a_gpu_that_is_not_there_and_a_foreign_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # of nobody
    asked = "2 processes, each with 1 CPUs and 99 GPUs are asked for; Ray has room for 0"
    with pytest.raises(ClusterError, match=asked), open_cluster(tmp_path, Wish(2, 1, 99), cpus=2):
        pass
    with open_cluster(tmp_path, Wish(1, 1, 0), cpus=1) as ray:
        assert ray.cluster_resources()["CPU"] == 1
        _reach(ray.get_runtime_context().gcs_address)  # which is one


# -- what is raised in an actor ---------------------------------------------------------------------------------------


def _mistake(folder: Path) -> SimulatedDevices:
    raise DataError("chats.jsonl: line 3 is not an object")


def _bug(folder: Path) -> SimulatedDevices:
    raise ZeroDivisionError("a bug of the start")


def _job(devices: SimulatedDevices, names: Sequence[str], shared: object) -> None:
    raise ZeroDivisionError("a bug of the job")


@pytest.mark.slow
def test_an_actor_that_raises_ends_the_run_with_what_it_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find tests
    run = create(tmp_path / "run", quick("ray.actors=2"))
    devices = load_devices(RunFolder(run.path))
    with pytest.raises(DataError) as mistake, open_workers(run, devices, _mistake):
        pass
    assert str(mistake.value) == "chats.jsonl: line 3 is not an object"
    with pytest.raises(ZeroDivisionError, match="a bug of the start") as bug, open_workers(run, devices, _bug):
        pass
    assert "in _bug\n" in bug.value.__notes__[0]
    with (
        open_workers(run, devices, run_devices_of_worker) as workers,
        pytest.raises(ZeroDivisionError, match="a bug of the job") as bug,
    ):
        list(workers.map(_job, [Cohort(("one",))]))
    assert "in _job\n" in bug.value.__notes__[0]
    assert "was lost" not in caplog.text
