"""Whether the tests notice what they should: plausible mistakes, made one at a time in a copy of the code.

`python tests/mutations/run.py` makes each change of the TOML files beside it, runs the tests that it names there and
says which of them noticed; with names, only those changes. Each is tried in a process that is forked after the heavy
libraries are imported, and before anything of this project is. Before that every named test has to pass in an
unchanged copy. Not covered: changes of more than one place, and whether tests that are not named would notice.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
COPIED = (
    "client",
    "configs",
    "docs",
    "florilegium",
    "privacy",
    "pyproject.toml",
    "README.md",
    "server",
    "simulation",
    "tests",
)
OURS = "florilegium"
HEAVY = (  # what tests import that is not of this project; nothing of it may compute before the fork
    "torch", "transformers", "transformers.generation", "transformers.models.llama.modeling_llama", "peft", "opacus",
    "flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation", "ray", "scipy.stats", "hypothesis", "plotly",
    "dp_accounting", "bm25s", "nltk", "typer", "rich.console", "pydantic", "cryptography", "jinja2", "httpx",
)  # fmt: skip
LIMIT_S = 300  # for one change: a test that goes on for ever has noticed nothing


@dataclass(frozen=True)
class Mutation:
    """A change of one place, and the tests of which one has to fail once it is made."""

    name: str
    about: str
    file: str
    was: str
    becomes: str
    tests: tuple[str, ...]

    def made(self, source: str) -> str:
        """The source with the change; raises ValueError where it does not apply."""
        if (found := source.count(self.was)) != 1:
            raise ValueError(f"mutation {self.name!r}: `was` occurs {found} times in {self.file}, must be once")
        if self.was == self.becomes:
            raise ValueError(f"mutation {self.name!r}: `becomes` is `was`: it changes nothing")
        changed = source.replace(self.was, self.becomes)
        if self.file.endswith(".py"):
            compile(changed, f"{self.file} with {self.name}", "exec", dont_inherit=True)
        return changed


@dataclass(frozen=True)
class Report:
    """What came of some tests in one copy."""

    broken: str = ""  # why they could not be tried
    failed: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    seconds: float = 0.0
    output: str = ""


@dataclass(eq=False)
class Recorder:
    """Of a session of pytest: which tests passed, which failed, and what could not even be imported."""

    failed: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(f"{report.nodeid} cannot be imported")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.passed and report.when == "call":
            self.passed.append(report.nodeid)


def load(root: Path = ROOT) -> list[Mutation]:
    """All changes of the TOML files, in the order of the files' names."""
    entries = [
        entry
        for path in sorted((root / "tests" / "mutations").glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    ]
    return [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def misfit(m: Mutation, root: Path = ROOT) -> str:
    """Why an entry does not fit the code and the tests as they are; empty where it does. Runs nothing."""
    try:
        m.made((root / m.file).read_text(encoding="utf-8"))
    except (ValueError, SyntaxError, OSError) as error:
        return str(error)
    gone = [test for test in m.tests if not _is_there(test, root)]
    return f"mutation {m.name!r}: no such test: {', '.join(gone)}" if gone or not m.tests else ""


def _is_there(test: str, root: Path) -> bool:
    path, _, name = test.partition("::")
    source = root / path
    return source.exists() and f"\ndef {name.partition('[')[0]}(" in source.read_text(encoding="utf-8")


def attempts(
    mutations: Sequence[Mutation], root: Path, work: Path, at_once: int
) -> Iterator[tuple[Mutation | None, Report]]:
    """Each change with what its tests said, as they end; first, for None, all tests without any change."""
    pristine = work / "pristine"
    for name in COPIED:
        if (source := root / name).is_dir():
            shutil.copytree(source, pristine / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, pristine / name)
    tests = sorted({test for m in mutations for test in m.tests})
    files = sorted({test.partition("::")[0] for test in tests})
    with Forks(at_once) as forks:
        for part in (files[k::at_once] for k in range(min(at_once, len(files)))):
            some = [test for test in tests if test.partition("::")[0] in part]
            forks.start(None, pristine, some, work / f"unchanged {part[0].replace('/', ' ')}")
        while forks.running:
            yield from forks.ended()
        for m in mutations:
            while forks.full:
                yield from forks.ended()
            copy = changed_copy(pristine, work / m.name, m)
            forks.start(m, copy, m.tests, copy)
        while forks.running:
            yield from forks.ended()


def changed_copy(pristine: Path, copy: Path, m: Mutation) -> Path:
    """The tree with a change: all other files, and their bytecode, are hard links."""
    shutil.copytree(pristine, copy, symlinks=True, copy_function=os.link)
    file = copy / m.file
    changed = m.made(file.read_text(encoding="utf-8"))
    for old in (file, *(file.parent / "__pycache__").glob(f"{file.stem}.*")):
        old.unlink()
    file.write_text(changed, encoding="utf-8")
    return copy


class Forks:
    """Processes that run tests in copies, a few at once. Each is the first of a group, which ends with it."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.running: dict[int, tuple[Mutation | None, Path, float]] = {}  # by process: what, where it reports, since

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.running:
            _end(child)

    @property
    def full(self) -> bool:
        return len(self.running) >= self.at_once

    def start(self, m: Mutation | None, copy: Path, tests: Sequence[str], reports: Path) -> None:
        """Runs tests in a copy; files whose names begin with that of `reports` say what came of them."""
        child = os.fork()
        if not child:
            _run_and_exit(copy, tests, reports, mutated=m is not None)
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(child, child)  # both do it: whoever comes first
        self.running[child] = m, reports, time.monotonic()

    def ended(self) -> Iterator[tuple[Mutation | None, Report]]:
        """Waits until at least one has ended."""
        while self.running:
            look = os.WEXITED | os.WNOHANG | os.WNOWAIT
            ended = [child for child in self.running if os.waitid(os.P_PID, child, look)]
            for child in ended:
                yield self._taken(child, "")
            late = [child for child, (m, _, began) in self.running.items() if m and _since(began) > LIMIT_S]
            for child in late:
                yield self._taken(child, f"its tests were not through after {LIMIT_S} s")
            if ended or late:
                return
            time.sleep(0.02)

    def _taken(self, child: int, broken: str) -> tuple[Mutation | None, Report]:
        _end(child)
        m, reports, began = self.running.pop(child)
        told, output = _beside(reports, "told"), _beside(reports, "output").read_text("utf-8", errors="replace")
        found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}
        broken = broken or found.pop("broken", "the process of its tests has died")
        if m:
            shutil.rmtree(reports)  # its copy
        return m, Report(broken, tuple(found.get("failed", ())), tuple(found.get("passed", ())), _since(began), output)


def _run_and_exit(copy: Path, tests: Sequence[str], reports: Path, mutated: bool) -> None:
    """In a new process: the tests, on the packages of the copy alone."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with _beside(reports, "output").open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))  # before what is installed
        os.environ["PYTHONPATH"] = str(copy)  # of processes that a test starts
        sys.dont_write_bytecode = mutated  # of what is unchanged it is there already
        recorder = Recorder()
        settings = ["-o", "addopts=", "-p", "no:cacheprovider", "-c", "pyproject.toml", "--tb=short", "-q"]
        until = ["--exitfirst"] if mutated else []
        said = pytest.main([*settings, *until, f"--basetemp={_beside(reports, 'tmp')}", *tests], plugins=[recorder])
        broken = recorder.broken
        if said not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not broken:
            broken = [f"pytest ended with {said!r}"]
        told = {"broken": "; ".join(broken), "failed": recorder.failed, "passed": recorder.passed}
        _beside(reports, "told").write_text(json.dumps(told), encoding="utf-8")
    finally:  # whether it has told anything says how it ended
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _beside(reports: Path, what: str) -> Path:
    return reports.parent / f"{reports.name}.{what}"


def _since(began: float) -> float:
    return time.monotonic() - began


def _end(child: int) -> None:
    """With all that it has started; its number is its group's, and nobody else's until it is waited for."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def complaint(m: Mutation | None, report: Report) -> str:
    """What is wrong with the tests, or with an entry; empty where a change was noticed."""
    end = report.output[-3000:]
    if m is None:
        wrong = report.broken or (f"fail without any change: {', '.join(report.failed)}" if report.failed else "")
        return f"the tests {wrong}\n{end}" if wrong else ""
    if report.broken:
        return f"BROKEN    {m.name}: {report.broken}; such a change shows nothing\n{end}"
    return "" if report.failed else f"SURVIVED  {m.name}: {m.about}\n          {m.file}; tried {', '.join(m.tests)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a change was not noticed, or an entry is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="changes to try; without any, all")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the sources; by default, these")
    parser.add_argument("--at-once", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--cold", action="store_true", help="import nothing before the first fork")
    asked = parser.parse_args(arguments)
    mutations = [m for m in load(asked.tree) if not asked.names or m.name in asked.names]
    if unknown := set(asked.names) - {m.name for m in mutations}:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    os.environ |= {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "GOMP_SPINCOUNT": "1000"}
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: sys.exit("stopped"))  # and the copies go, and what runs in them
    began = time.monotonic()
    for name in () if asked.cold else HEAVY:
        with suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(name)
    early = [name for name in sys.modules if name.partition(".")[0] == OURS]
    assert not early, f"imported before the fork, so that no change of them would be seen: {early}"
    print(f"imported after {_since(began):.0f} s", flush=True)
    complaints = []
    with TemporaryDirectory(prefix="mutations-") as work:
        for m, report in attempts(mutations, asked.tree, Path(work), asked.at_once):
            if said := complaint(m, report):
                complaints.append(said)
            name, by = (m.name, report.failed[:1]) if m else ("unchanged", (f"{len(report.passed)} tests",))
            print(said or f"{report.seconds:5.1f} s  {name}: {' '.join(by)}", flush=True)
            if m is None and said:
                break
    print(f"{len(mutations)} changes, {len(complaints)} complaints, {_since(began):.0f} s", flush=True)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
