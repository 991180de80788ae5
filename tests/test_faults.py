"""What becomes of a device that raises: a run ends with one error; where faults are simulated, they count."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL

import florilegium
from florilegium.client import round as client_round
from florilegium.client.state import DeviceState
from florilegium.privacy.common import errors
from florilegium.privacy.common.errors import BrokenDeviceError, DeviceFaultError, FlorilegiumError, UserError
from florilegium.privacy.ledger import LedgerError
from florilegium.simulation import recorder
from florilegium.simulation.baselines import run as baselines_run
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.engines.faults import (
    ElsewhereError,
    Failure,
    TooManyFailedError,
    attempt,
    leave,
    left,
    tried,
)
from florilegium.simulation.evaluation import evaluator
from florilegium.simulation.experiment import run_experiment
from florilegium.simulation.runs.events import DeviceFailure
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.settings import ConfigError, find_config
from florilegium.simulation.studies.config import load_study
from florilegium.simulation.studies.runner import run_study

FOUR = ["a", "b", "c", "d"]
QUICK = (*SMALL, "data.users=4", "rounds=1", "evaluation.pooled_epochs=0", "synthesis.sampling.max_new_tokens=2")
PHASES = (
    "observe",
    "annotate",
    "learn_shared",
    "release",
    "synthesize",
    "learn_personal",
)  # as records name what `client.round` calls
JOBS = ("learn_without_server", "personal_rows", "scored", "replied", "joined_late")  # of an evaluation


def breaking(*broken: int) -> Callable[[Sequence[int]], str]:
    def work(places: Sequence[int]) -> str:
        if set(places) & set(broken):
            raise TypeError("no such keyword")
        return "done"

    return work


# -- one cohort -----------------------------------------------------------------------------------------------------


def test_the_device_that_breaks_a_cohort_is_found() -> None:
    assert tried(breaking(), FOUR) == "done"
    for place, name in enumerate(FOUR):
        with pytest.raises(BrokenDeviceError) as caught:
            tried(breaking(place), FOUR)
        assert caught.value.device == name
        assert (
            str(caught.value) == f"{name}: TypeError: no such keyword; of the 3 others in its cohort none failed alike"
        )
        assert caught.value.traced.count("Traceback") == 1 and "in work" in caught.value.traced
    with pytest.raises(BrokenDeviceError, match=r"a: .* of the 3 others in its cohort 2 failed alike"):
        tried(breaking(0, 1, 3), FOUR)
    with pytest.raises(BrokenDeviceError, match=r"b: .*; the other device in its cohort did not fail alike"):
        tried(breaking(1), FOUR[:2])
    with pytest.raises(BrokenDeviceError, match=r"a: .*; the other device in its cohort failed alike"):
        tried(breaking(0, 1), FOUR[:2])
    with pytest.raises(BrokenDeviceError, match=r"a: .*; it was alone in its cohort"):
        tried(breaking(0), FOUR[:1])


def test_of_a_large_cohort_some_are_asked_whether_they_fail_alike() -> None:
    names = [f"device-{k:02d}" for k in range(50)]
    with pytest.raises(BrokenDeviceError, match=r"device-00.*of the 7 tried of 49 others in its cohort 7 failed alike"):
        tried(breaking(*range(50)), names)


def test_devices_that_fail_only_together_are_told_as_such() -> None:
    def work(places: Sequence[int]) -> None:
        if len(places) > 1:
            raise TypeError("shapes do not fit")

    with pytest.raises(BrokenDeviceError, match="only together"):
        tried(work, FOUR)


@pytest.mark.parametrize("error", [ConfigError("set it"), LedgerError("torn"), MemoryError()])
def test_what_is_nobodys_bug_passes_as_it_is(error: Exception) -> None:
    def work(_: Sequence[int]) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        tried(work, FOUR)
    assert caught.value is error


def test_a_broken_device_comes_whole_out_of_another_process() -> None:
    error = BrokenDeviceError("a", "TypeError: x", "it was alone", "Traceback …")
    again = pickle.loads(pickle.dumps(error))
    assert (again.device, again.traced, str(again)) == (error.device, error.traced, str(error))


def job(fault: type[Exception]) -> Callable[..., dict[str, int]]:
    def length(_: object, names: Sequence[str], shared: int) -> dict[str, int]:
        if "c" in names:
            raise fault("its disk is full")
        return dict.fromkeys(names, shared)

    return length


def test_faults_are_counted_where_that_is_asked_for_and_bugs_are_not() -> None:
    found = attempt(job(DeviceFaultError), True, None, FOUR, 7)
    assert found.failed == {"c": "DeviceFaultError: its disk is full"}
    assert [(names, result) for names, result in found.results] == [(("a", "b"), {"a": 7, "b": 7}), (("d",), {"d": 7})]
    with pytest.raises(BrokenDeviceError, match="c: DeviceFaultError"):
        attempt(job(DeviceFaultError), False, None, FOUR, 7)
    with pytest.raises(BrokenDeviceError, match="c: KeyError"):
        attempt(job(KeyError), True, None, FOUR, 7)


def test_what_another_process_left_is_raised_or_counted(tmp_path: Path) -> None:
    leave(tmp_path / "faults", "a", "release", "DeviceFaultError: x")
    assert left(tmp_path / "faults") == [Failure("a", "release", "DeviceFaultError: x")]
    assert left(tmp_path / "faults") == []
    leave(tmp_path / "faults", "a", "adoption", BrokenDeviceError("a", "TypeError: x", "alone", "Traceback"))
    with pytest.raises(BrokenDeviceError, match="TypeError: x"):
        left(tmp_path / "faults")
    leave(tmp_path / "faults", "a", "adoption", ConfigError("set it"))
    with pytest.raises(ElsewhereError, match="set it"):
        left(tmp_path / "faults")


# -- a run ----------------------------------------------------------------------------------------------------------


def config(*more: str) -> ExperimentConfig:
    return load_config(find_config("quickstart"), [*QUICK, "evaluation.newcomers=1", *more])


def broken(module: Any, name: str, fault: type[Exception], only: str, patch: pytest.MonkeyPatch) -> None:
    """Has a phase or a job raise for the device `only`, or for all devices."""
    function = "train_shared" if name == "learn_shared" else name
    whole = getattr(module, function)

    def phase(*args: Any, **named: Any) -> Any:
        devices = [x for part in args if isinstance(part, list) for x in part if isinstance(x, str | DeviceState)]
        if not only or only in [x if isinstance(x, str) else x.id for x in devices]:
            raise fault(f"{name} is broken")
        return whole(*args, **named)

    phase.__name__ = name
    patch.setattr(module, function, phase)


@pytest.mark.parametrize("only", ["", "device-00002"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_that_raises_ends_the_run_and_says_where(
    phase: str, only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        broken(client_round, phase, TypeError, only, patch)
        with pytest.raises(BrokenDeviceError) as caught:
            run_experiment(config(), tmp_path / "run")
    alike = "none" if only else "3"
    assert str(caught.value) == (
        f"{only or 'device-00000'}: TypeError: {phase} is broken, in the phase {phase} of round 1; "
        f"of the 3 others in its cohort {alike} failed alike"
    )
    assert caught.value.traced.count("Traceback") == 1 and f"{phase} is broken" in caught.value.traced
    assert not (tmp_path / "run" / "summary.json").exists()
    if only and phase == "learn_personal":  # after the mend it goes on
        summary = run_experiment(config(), tmp_path / "run", resuming=True)
        assert summary.tokens_trained > 0 and not summary.failures and not summary.refused


def test_an_evaluation_that_raises_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its jobs in turn, on one run that goes on after each."""
    for name in JOBS:
        with monkeypatch.context() as patch:
            only = "device-00004" if name == "joined_late" else "device-00002"
            broken(of_evaluation(name), name, TypeError, only, patch)
            with pytest.raises(BrokenDeviceError, match=f"{only}: .*{name} is broken"):
                run_experiment(config(), tmp_path / "run", resuming=name != JOBS[0])
        assert not (tmp_path / "run" / "summary.json").exists()


def of_evaluation(name: str) -> Any:
    """The module where such a job is called."""
    return recorder if name == "learn_without_server" else evaluator


COUNTED = "engine.on_device_error=count", "engine.failed_share=0.5"


@pytest.mark.parametrize(
    "faults",
    [
        [("learn_shared", "release"), ("learn_personal", "adoption"), ("learn_without_server", "control")],
        [("personal_rows", "evaluation"), ("scored", "evaluation"), ("replied", "evaluation")],
    ],
    ids=["learning", "evaluation"],
)
def test_counted_faults_are_in_table_summary_and_report(
    faults: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on a device of its own; the fourth is sound."""
    from rich.console import Console

    from florilegium.simulation.reports.terminal import render_summary

    devices = {name: f"device-0000{k}" for k, (name, _) in enumerate(faults)}
    for name, device in devices.items():
        broken(client_round if name in PHASES else of_evaluation(name), name, DeviceFaultError, device, monkeypatch)
    summary = run_experiment(config(*COUNTED), tmp_path / "run")
    counted = Counter(what for _, what in faults)
    assert summary.failures == counted
    events = list(RunFolder(tmp_path / "run").events_of(DeviceFailure))
    assert sorted((e.device, e.what, e.round) for e in events) == sorted(
        (devices[name], what, 1) for name, what in faults
    )
    for event in events:
        assert next(name for name, device in devices.items() if device == event.device) in event.error
    with Console(width=120).capture() as _, Console(width=120, record=True) as console:
        console.print(render_summary(summary))
    table, page = console.export_text(), (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for what, count in counted.items():
        assert f"{count} × {what}" in table and f"{count} × {what}" in page
    assert "; the first, device-0000" in page
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    unscored = {devices[n] for n in devices if n in ("learn_without_server", "personal_rows", "scored")}
    assert {json.loads(line)["device"] for line in lines} == {f"device-0000{k}" for k in range(4)} - unscored


def test_too_many_faults_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(client_round, "synthesize", DeviceFaultError, "device-00002", monkeypatch)
    with pytest.raises(
        TooManyFailedError, match=r"adoption failed on 1 of 4 devices; engine.failed_share = 0.1.*00002"
    ):
        run_experiment(config("engine.on_device_error=count"), tmp_path / "run")


def test_an_engine_is_named_alone_or_with_its_settings() -> None:
    short, both = config("engine=flower"), config("engine=flower", "engine.on_device_error=count")
    assert (short.engine.name, short.engine.on_device_error) == ("flower", "end")
    assert (both.engine.name, both.engine.on_device_error) == ("flower", "count")


def test_a_study_names_the_device_that_breaks_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'data = { users = 3, max_pairs = 40 }\n[study.tables.one]\nrows = { "selection.policy" = ["fifo"] }\n'
    (tmp_path / "small.toml").write_text(text, encoding="utf-8")
    study = load_study(tmp_path / "small.toml", ["rounds=1", "synthesis.per_dialogue=0", "study.seeds=1"])
    broken(client_round, "learn_personal", TypeError, "seed0-001", monkeypatch)
    with pytest.raises(BrokenDeviceError, match=r"seed0-001: TypeError.*learn_personal of round 1; of the 2 others"):
        run_study(study, tmp_path / "study", lambda phase: None)


def test_a_study_of_baselines_names_the_device_and_the_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(find_config("rivals"), ["data.users=3", "data.min_pairs=24", "study.seeds=1", "rounds=1"])
    broken(baselines_run, "observe", TypeError, "seed0-001", monkeypatch)
    with pytest.raises(BrokenDeviceError, match=r"seed0-001: TypeError.*observe of round 1; of the 2 others"):
        run_study(study, tmp_path / "study", lambda phase: None)


# -- the command ----------------------------------------------------------------------------------------------------

BUG = """
import importlib.abc
import importlib.util
import sys


class Breaking(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name != "florilegium.client.round":
            return None
        sys.meta_path.remove(self)
        self.whole = importlib.util.find_spec(name)
        return importlib.util.spec_from_loader(name, self, origin=self.whole.origin)

    def exec_module(self, module):
        self.whole.loader.exec_module(module)

        def synthesize(states, plan, context):
            raise TypeError("synthesize is broken")

        module.synthesize = synthesize


sys.meta_path.insert(0, Breaking())
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", [(), ("engine=flower",)], ids=["one process", "flower"])
def test_a_bug_is_told_once_and_the_run_goes_on_after_the_mend(engine: tuple[str, ...], tmp_path: Path) -> None:
    """In whichever process it is: one traceback, the device, the round, the phase, an exit code that says so."""
    (tmp_path / "bug").mkdir()
    (tmp_path / "bug" / "sitecustomize.py").write_text(BUG, encoding="utf-8")
    command = [sys.executable, "-m", "florilegium", "run", "quickstart", *QUICK, *engine, "name=run", "--runs", "runs"]
    paths = os.pathsep.join([str(tmp_path / "bug"), str(Path(florilegium.__file__).parents[1])])
    ill = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=500
    )
    assert ill.returncode == 1, ill.stdout + ill.stderr
    told = r"device-0000\d: TypeError: synthesize is broken, in the phase synthesize of round 1"
    assert re.search(told, ill.stderr), ill.stderr
    assert ill.stderr.count("Traceback") == 1 and "after the mend" in ill.stderr, ill.stderr
    assert not (tmp_path / "runs" / "run" / "summary.json").exists()
    healthy = {**os.environ, "PYTHONPATH": str(Path(florilegium.__file__).parents[1])}
    well = subprocess.run(
        [*command, "--resume"], cwd=tmp_path, env=healthy, capture_output=True, text=True, timeout=500
    )
    assert well.returncode == 0, well.stdout + well.stderr
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["tokens_trained"] > 0 and not summary["failures"] and not summary["refused"]


# -- the tree -------------------------------------------------------------------------------------------------------


def test_the_tree_of_errors_names_all_of_them() -> None:
    import florilegium.simulation.benchmarks.engine_worker
    import florilegium.simulation.reports.run_report  # noqa: F401

    def below(kind: type[Exception]) -> set[type[Exception]]:
        return {kind}.union(*(below(k) for k in kind.__subclasses__()))

    ours = [k for k in below(FlorilegiumError) if not k.__module__.startswith("test")]
    missing = [k.__name__ for k in ours if k.__name__ not in str(errors.__doc__)]
    assert not missing, missing
    assert issubclass(TooManyFailedError, UserError)
