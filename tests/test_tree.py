"""How the packages may depend on each other, and that what the README shows is what is tested."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from florilegium.simulation.cli.doctor import TRIED

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
ALLOWED = {
    "privacy": {"privacy"},
    "client": {"client", "privacy"},
    "server": {"server", "privacy"},
    "simulation": {"privacy", "client", "server", "simulation"},
}
FLOORS = (  # of simulation/, from the ground up: a module imports from its own folder and from the floors below
    {"data"},
    {"settings"},
    {"config", "tasks", "models"},
    {"runs"},
    {"heterogeneity", "rounds"},
    {"devices", "reports"},
    {"engines"},
    {"evaluation", "audit", "deployment"},
    {"recorder", "baselines", "personalization"},
    {"studies"},
    {"flower_app", "benchmarks"},
    {"results"},
    {"experiment"},
    {"cli"},
)
WITH_FLOWER = {
    "simulation/benchmarks/engine_flower.py",
    "simulation/benchmarks/scale_idle_client.py",
    "simulation/benchmarks/secure_flower.py",
    "simulation/benchmarks/scale_flower.py",
    "client/agent/supernode.py",
    "client/agent/supernode_process.py",
    "client/flower_replies.py",
    "client/flower_arrays.py",
    "server/fedbuff.py",
    "server/release_collector.py",
    "server/secure_round.py",
    "server/strategy.py",
    "simulation/flower_app.py",
    "simulation/engines/flower_ray.py",
    "simulation/engines/cohort_grid.py",
    "simulation/rounds.py",
    "simulation/recorder.py",
    "simulation/engines/in_memory.py",
    "simulation/engines/strategy.py",
    "simulation/engines/world_grid.py",
    "simulation/audit/inventory.py",
    "simulation/deployment/https_server.py",
    "simulation/deployment/link.py",
    "simulation/deployment/rounds.py",
    "client/agent/signature.py",
    "simulation/benchmarks/https_server.py",
}


def imports(path: Path) -> set[str]:
    """All imported module names, those inside functions and for types alone too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[Path]:
    """All modules of the four packages."""
    return [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    first = {name.partition(".")[0] for name in imports(path)}
    assert not first & set(ALLOWED), f"{path}: imports of ours begin with florilegium"
    assert {name.split(".")[1] for name in imports(path) if name.startswith("florilegium.")} <= ALLOWED[package]
    if "flwr" in first:
        assert str(path.relative_to(ROOT)) in WITH_FLOWER


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Which module of ours imports which: those inside functions and for types alone too; without the packages' own
    faces, which import when they are asked.
    """
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sources()}
    found: dict[str, set[str]] = {name: set() for name in paths if not name.endswith("__init__")}
    for name in found:
        for imported in (i.removeprefix("florilegium.") for i in imports(paths[name]) if i.startswith("florilegium.")):
            while imported and imported not in found:
                imported = imported.rpartition(".")[0]
            found[name] |= {imported} - {"", name}
    return found


def floor(name: str) -> int:
    (found,) = (number for number, rooms in enumerate(FLOORS) if name.split(".")[1] in rooms)
    return found


def test_nothing_in_the_simulation_imports_upward(graph: dict[str, set[str]]) -> None:
    """Nor from another folder of its own floor."""
    found = {
        (name, other)
        for name in graph
        for other in graph[name]
        if name.startswith("simulation.") and other.startswith("simulation.")
        if floor(name) <= floor(other) and name.split(".")[1] != other.split(".")[1]
    }
    assert not found


def test_no_module_needs_itself(graph: dict[str, set[str]]) -> None:
    """No circle, in any of the four packages or across them."""
    assert not {name for name in graph if name in reached(graph, name)}


def reached(graph: dict[str, set[str]], name: str) -> set[str]:
    """All that a module imports, and what that imports."""
    found, ahead = set[str](), [name]
    while ahead:
        new = graph[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def test_what_is_installed_was_tried_and_nothing_else_is_asked_for() -> None:
    """Where we lean on internals, the bounds are the lowest version tried and the minor after the newest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for package, (lowest, newest) in TRIED.items():
        assert Version(lowest) <= Version(Version(version(package)).public) <= Version(newest), package
        if package != "ray":  # which Flower fixes
            beyond = f"{Version(newest).major}.{Version(newest).minor + 1}"
            bounds = SpecifierSet(f">={'.'.join(lowest.split('.')[:2])},<{beyond}")
            assert asked[package] == bounds, (package, str(asked[package]))


def test_the_classifiers_are_the_pythons_of_the_table_of_wheels() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    checked = re.search(r"for version in (.*); do", (ROOT / ".ci" / "wheels").read_text(encoding="utf-8"))
    table = re.findall(r"^\| (3\.\d+) \| x86_64 aarch64", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    assert checked and said == checked[1].split() == table
    extras = re.search(r"extras=\((.*?)\)", (ROOT / ".ci" / "wheels").read_text(encoding="utf-8"))
    header = re.search(r"^\| Python \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    assert extras and header and extras[1].split() == header[1].split(" | ")
    assert set(extras[1].split()) | {"docs", "notebook"} >= set(project["optional-dependencies"])


def test_the_help_loads_no_model_library() -> None:
    probe = "import sys, florilegium.simulation.cli.main\n"
    probe += "print(sorted({'torch', 'flwr', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_check_runs_what_the_readme_shows() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    check = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("pip install -q", "pip install")
    for command in (
        "pip install '.[simulation]' && florilegium run configs/quickstart.toml",
        "pip install '.[test]' && pytest",
    ):
        assert command in readme and command in check


def test_every_config_says_how_it_is_launched() -> None:
    for path in sorted((ROOT / "configs").rglob("*.toml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and ("florilegium " in first or "flwr run" in first), path
        tomllib.loads(path.read_text(encoding="utf-8"))


def test_a_flower_bundle_holds_no_code_and_no_weights(tmp_path: Path) -> None:
    done = subprocess.run([BIN / "flwr", "build", "--app", ROOT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = tmp_path.glob("*.fab")
    assert bundle.stat().st_size < 2**20
    names = ZipFile(bundle).namelist()
    assert "configs/flwr.toml" in names and not [n for n in names if n.endswith((".safetensors", ".py"))]


@pytest.mark.slow
def test_a_board_needs_nothing_that_only_a_simulation_needs() -> None:
    """The agent, its page and its courier load without the packages of the extra [simulation]."""
    probe = """
import sys
sys.modules |= dict.fromkeys(["ray", "plotly", "chitchat_dataset"])  # None: an import fails
from florilegium.client.agent import agent, cli, daemon, supernode
import florilegium.simulation.cli.main
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_flwr_run_works_from_the_repository(tmp_path: Path) -> None:
    """SuperNodes of Flower's own local deployment, as README has it and with settings and a policy of one's own.

    The weights come from the installed distribution, the policy from a folder on PYTHONPATH.
    """
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 39091)) == 0:
            pytest.skip("a SuperLink of somebody else listens on port 39091")
    (tmp_path / "own_lab.py").write_text(OWN_POLICY, encoding="utf-8")
    bundled = (ROOT / "configs" / "flwr.toml").read_text(encoding="utf-8").replace("rounds = 2", "rounds = 1")
    own = bundled.replace("[selection]", '[selection]\npolicy = "own_lab:SHORTEST"')
    (tmp_path / "own.toml").write_text(own, encoding="utf-8")
    home = {**os.environ, "HOME": str(tmp_path), "FLWR_HOME": str(tmp_path / ".flwr"), "PYTHONPATH": str(tmp_path)}
    home["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    command = [BIN / "flwr", "run", ROOT, "--federation-config", "num-supernodes=4", "--stream"]
    try:
        assert _flower_ran(command, tmp_path, home)["devices"] == 4
        last = _flower_ran([*command, "--run-config", f'config="{tmp_path / "own.toml"}"'], tmp_path, home)
        assert (last["devices"], last["rounds"], last["config"]["selection"]["policy"]) == (4, 1, "own_lab:SHORTEST")
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if any("flower-superlink" in part for part in process.info["cmdline"] or ()) and _home(process) == tmp_path:
                process.terminate()


OWN_POLICY = """
from florilegium.client.selection import Policy

SHORTEST = Policy(lambda bins, newcomer, memory, rng: max(range(len(bins)), key=lambda i: len(bins[i].prompt)))
"""


def _flower_ran(command: list[Any], folder: Path, environment: dict[str, str]) -> Any:
    """What the newest run of Flower's app wrote of itself."""
    before = set((folder / ".florilegium" / "runs").glob("flwr-*"))
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = set((folder / ".florilegium" / "runs").glob("flwr-*")) - before
    config = tomllib.loads((found / "config.toml").read_text(encoding="utf-8"))
    return json.loads((found / "summary.json").read_text(encoding="utf-8")) | {"config": config}


def _home(process: psutil.Process) -> Path | None:
    try:
        return Path(process.environ().get("HOME", ""))
    except psutil.Error:
        return None
