"""How the packages may depend on each other, and that what the README shows is what is tested."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "privacy": {"privacy"},
    "client": {"client", "privacy"},
    "server": {"server", "privacy"},
    "simulation": {"privacy", "client", "server", "simulation"},
}
WITH_FLOWER = {
    "client/app.py",
    "server/strategy.py",
    "simulation/app.py",
    "simulation/grid.py",
    "simulation/experiment.py",
    "simulation/session.py",
}


def imports(path: Path) -> set[str]:
    """First parts of all imported module names, those inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(str(node.module).split(".")[0])
    return found


def sources() -> list[Path]:
    return [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imports(path) & set(ALLOWED) <= ALLOWED[package]
    if "flwr" in imports(path):
        assert str(path.relative_to(ROOT)) in WITH_FLOWER


def test_the_private_import_of_flower_is_of_a_version_that_was_tried() -> None:
    """`TaskIdentity` is private: a newer Flower has to be tried before the bound in pyproject.toml is raised."""
    assert version("flwr").startswith("1.41.")


def test_the_help_loads_no_model_library() -> None:
    probe = "import sys, simulation.cli; print(sorted({'torch', 'flwr', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_check_runs_what_the_readme_shows() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    check = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("pip install -q", "pip install")
    for command in ("pip install . && florilegium run configs/quickstart.toml", "pip install '.[test]' && pytest"):
        assert command in readme and command in check


def test_every_config_says_how_it_is_launched() -> None:
    for path in sorted((ROOT / "configs").rglob("*.toml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and ("florilegium " in first or "flwr run" in first), path
        tomllib.loads(path.read_text(encoding="utf-8"))
