"""Processes that are forked from the driver: who does what, what becomes of lost work, and what is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import SMALL

from florilegium.client.context import CohortContext
from florilegium.client.lm.model import LanguageModel
from florilegium.privacy.common.machine import cores, group_memory_left_bytes
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.engines.processes import ForkedWorkers, process_count
from florilegium.simulation.engines.scheduler import cohort_size
from florilegium.simulation.engines.workers import Cohort
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.settings import ConfigError, config_folder

CPU = torch.device("cpu")
COHORTS = [Cohort((f"device-{k}", f"device-{k + 1}")) for k in range(0, 8, 2)]


def config_of(*overrides: str) -> ExperimentConfig:
    return load_config(config_folder() / "quickstart.toml", [*SMALL, *overrides])


@dataclass(frozen=True)
class Bare:
    """What a process asks of devices."""

    context: CohortContext

    @property
    def listener(self) -> Callable[[str], None] | None:
        return self.context.listener

    def telling(self, listener: Callable[[str], None]) -> Bare:
        return Bare(replace(self.context, listener=listener))


@pytest.fixture
def phases() -> list[str]:
    return []


@pytest.fixture
def workers(phases: list[str], lm: LanguageModel) -> Iterator[ForkedWorkers]:
    """Two of them; nothing of any is left."""
    context = CohortContext.of(lm, config_of(), 0, lambda device, dialogue: "", phases.append)
    with closing(ForkedWorkers(Bare(context), 2)) as found:
        yield found
    alive = {child.pid for child in psutil.Process().children()}
    assert not alive & {process.pid for process in found.processes}


def tell(devices: Any, names: Sequence[str], shared: int) -> tuple[int, int, int]:
    devices.context.listener("telling")
    return os.getpid(), torch.get_num_threads(), shared


def die(devices: Any, names: Sequence[str], shared: Path | None) -> str:
    """Ends its process over one device; with a folder, once."""
    if "device-4" in names and not (shared and (shared / "died").exists()):
        if shared:
            (shared / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return names[0]


class OddError(Exception):
    """Cannot be made anew from its arguments."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def fail(devices: Any, names: Sequence[str], shared: str) -> str:
    if "device-4" in names:
        raise OddError("this", "that") if shared == "odd" else ZeroDivisionError("a bug of the job")
    return names[0]


def test_every_cohort_is_done_once_by_processes_of_one_thread(workers: ForkedWorkers, phases: list[str]) -> None:
    for shared in (1, 2):
        done = dict(workers.map(tell, COHORTS, shared))
        assert set(done) == set(COHORTS)
        assert {found[1:] for found in done.values()} == {(1, shared)}
        assert os.getpid() not in {pid for pid, _, _ in done.values()} <= {process.pid for process in workers.processes}
    assert phases and set(phases) == {"telling"}


def test_the_work_of_a_process_that_is_lost_is_done_again(workers: ForkedWorkers, tmp_path: Path) -> None:
    before = {process.pid for process in workers.processes}
    assert dict(workers.map(die, COHORTS, tmp_path)) == {cohort: cohort.names[0] for cohort in COHORTS}
    after = {process.pid for process in workers.processes}
    assert len(before & after) == 1 and len(after) == 2


def test_devices_over_which_every_process_is_lost_are_named(workers: ForkedWorkers) -> None:
    with pytest.raises(RunError, match=r"4 processes were lost over the devices device-4 … device-5: exit code -9"):
        dict(workers.map(die, COHORTS))
    assert len(dict(workers.map(tell, COHORTS, 0))) == 4  # the others are still there


@pytest.mark.parametrize(("shared", "kind"), [("", ZeroDivisionError), ("odd", RuntimeError)])
def test_what_a_job_raises_is_raised_here_with_its_traceback(
    workers: ForkedWorkers, shared: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as raised:
        list(workers.map(fail, COHORTS, shared))
    assert "in fail\n" in "".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    assert len(dict(workers.map(tell, COHORTS, 0))) == 4


def test_who_stops_listening_leaves_no_answer_for_the_next_job(workers: ForkedWorkers) -> None:
    for _ in workers.map(tell, COHORTS, 1):
        break
    assert {found[2] for found in dict(workers.map(tell, COHORTS, 2)).values()} == {2}


def test_a_container_has_the_cores_and_the_memory_of_its_groups(tmp_path: Path) -> None:
    """Half a core within a group of two; 300 of 1,000 bytes taken, of which 100 are a file's, within one of 700."""
    own, outer = tmp_path / "own", tmp_path / "groups" / "pod"
    inner = outer / "box"
    inner.mkdir(parents=True)
    own.write_text("4:memory:/elsewhere\n0::/pod/box\n")
    assert cores(tmp_path / "groups", own) == cores() and group_memory_left_bytes(tmp_path / "groups", own) is None
    (outer / "cpu.max").write_text("200000 100000\n")
    (inner / "cpu.max").write_text("max 100000\n")
    assert cores(tmp_path / "groups", own) == min(2, cores())
    (inner / "cpu.max").write_text("50000 100000\n")
    assert cores(tmp_path / "groups", own) == 1
    for group, limit, taken in ((outer, "max", 650), (inner, 1000, 300)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{taken}\n")
    (inner / "memory.stat").write_text("anon 200\ninactive_file 100\n")
    assert group_memory_left_bytes(tmp_path / "groups", own) == 800
    (outer / "memory.max").write_text("700\n")
    assert group_memory_left_bytes(tmp_path / "groups", own) == 50


def test_there_are_as_many_processes_as_cores_and_cohorts_employ() -> None:
    few, many = config_of("data.users=16"), config_of("data.users=1000")
    assert process_count(few, CPU) == 1 and process_count(many, CPU) == cores()
    assert process_count(config_of("data.users=16", "workers=3"), CPU) == 3
    assert process_count(many, torch.device("cuda")) == 1
    assert [cohort_size(many, n) for n in (5, 64, 1000, 10_000)] == [16, 16, 32, 128]
    for other in ("ray.actors=2", "engine=flower"):
        with pytest.raises(ConfigError, match="workers = 2 needs engine = 'cohort'"):
            config_of("workers=2", other)


@dataclass(frozen=True)
class Unreadable:
    """Cannot be made anew in another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def give(devices: Any, names: Sequence[str], shared: str) -> Any:
    if shared == "leave":
        raise SystemExit(3)
    return Unreadable()


@pytest.mark.parametrize(("shared", "told"), [("", "no number"), ("leave", "SystemExit: 3")])
def test_what_cannot_be_answered_is_told_and_nobody_waits(workers: ForkedWorkers, shared: str, told: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=told):
        list(workers.map(give, COHORTS, shared))
    with pytest.raises(ValueError, match="no number"):
        list(workers.map(tell, COHORTS, Unreadable()))
    assert len(dict(workers.map(tell, COHORTS, 0))) == 4


def test_a_generator_that_outlives_the_processes_starts_none(lm: LanguageModel) -> None:
    context = CohortContext.of(lm, config_of(), 0, lambda device, dialogue: "")
    with closing(ForkedWorkers(Bare(context), 2)) as found:
        held = found.map(tell, COHORTS, 1)
        next(held)
    held.close()  # type: ignore[attr-defined]
    assert not {p.pid for p in found.processes} & {child.pid for child in psutil.Process().children()}
