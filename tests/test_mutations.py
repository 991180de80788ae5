"""The tests notice plausible mistakes: those of `tests/mutations`, and what tries them says what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mutations.run import load, misfit

RUN = Path(__file__).parent / "mutations" / "run.py"
MUTATIONS = load()
DOUBLE = '''"""Twice."""


def double(x: int) -> int:
    return 2 * x  # twice
'''
TESTS = """
from florilegium.client.thing import double

def test_a_number_by_hand():
    assert double(3) == 6

def test_of_nothing():
    assert True

def test_that_fails_anyway():
    assert double(3) == 5
"""


@pytest.mark.parametrize("name", [m.name for m in MUTATIONS])
def test_every_change_still_applies(name: str) -> None:
    """Its text is there once, what it becomes can be compiled, its tests are there, and no other has its name."""
    (m,) = (m for m in MUTATIONS if m.name == name)
    assert misfit(m) == ""


def test_what_does_not_fit_is_told_by_its_name(tmp_path: Path) -> None:
    tree(tmp_path, ("return 2", "return 3", "test_a_number_by_hand"))
    (m,) = load(tmp_path)
    assert misfit(m, tmp_path) == ""
    (tmp_path / "client" / "thing.py").write_text("")
    assert "change-0" in misfit(m, tmp_path) and "occurs 0 times" in misfit(m, tmp_path)
    tree(tmp_path, ("return", "give back", "test_a_number_by_hand"), ("return 2", "return 3", "test_gone"))
    broken, untested = load(tmp_path)
    assert "invalid syntax" in misfit(broken, tmp_path) and "test_gone" in misfit(untested, tmp_path)


def test_noticed_is_told_from_survived_and_from_what_could_not_be_tried(tmp_path: Path) -> None:
    tree(
        tmp_path,
        ("return 2", "return 3", "test_a_number_by_hand"),
        ("# twice", "# two times", "test_a_number_by_hand"),
        ("return 2", "return 3", "test_of_nothing"),
        ("def double", "def triple", "test_a_number_by_hand"),
    )
    told = tried(tmp_path)
    assert told.returncode == 1
    assert "change-0: tests/test_thing.py::test_a_number_by_hand" in told.stdout
    assert "SURVIVED  change-1" in told.stdout and "SURVIVED  change-2" in told.stdout
    assert "BROKEN    change-3" in told.stdout and "cannot be imported" in told.stdout
    assert "4 changes, 3 complaints" in told.stdout
    assert tried(tmp_path, "change-0").returncode == 0


def test_a_test_that_fails_without_the_change_is_no_witness(tmp_path: Path) -> None:
    tree(tmp_path, ("return 2", "return 3", "test_that_fails_anyway"))
    told = tried(tmp_path)
    assert (
        told.returncode == 1 and "fail without any change: tests/test_thing.py::test_that_fails_anyway" in told.stdout
    )


@pytest.mark.slow
def test_every_change_is_noticed() -> None:
    told = subprocess.run([sys.executable, str(RUN)], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def tree(root: Path, *changes: tuple[str, str, str]) -> None:
    """A project of one function and three tests, with changes of it."""
    for folder in ("client", "tests/mutations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "client" / "__init__.py").write_text("")
    (root / "florilegium").mkdir(exist_ok=True)
    (root / "florilegium" / "__init__.py").write_text("")
    if not (root / "florilegium" / "client").is_symlink():
        (root / "florilegium" / "client").symlink_to("../client")
    (root / "client" / "thing.py").write_text(DOUBLE)
    (root / "tests" / "test_thing.py").write_text(TESTS)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    entries = [
        f'[[mutation]]\nname = "change-{k}"\nabout = "of {was}"\nfile = "client/thing.py"\nwas = "{was}"\n'
        f'becomes = "{becomes}"\ntests = ["tests/test_thing.py::{test}"]\n'
        for k, (was, becomes, test) in enumerate(changes)
    ]
    (root / "tests" / "mutations" / "some.toml").write_text("\n".join(entries))


def tried(root: Path, *names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), *names, "--tree", str(root), "--cold"]
    return subprocess.run(command, capture_output=True, text=True)
