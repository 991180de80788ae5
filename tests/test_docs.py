"""README and docs: every block is run by a test or says why not, every command can be said, the site builds.

The comment before a block says which: `<!-- run -->` (here, in the order of the page), `<!-- run by: … -->` (the check,
or a test that exists), `<!-- not run: why -->`, `<!-- no command -->`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import typer

from florilegium.simulation.cli.known_settings import find_setting, kind_of_file
from florilegium.simulation.cli.main import app  # with all commands
from florilegium.simulation.settings import ConfigError, find_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OVERRIDDEN = {"describe": "data", "import": "data", "check": "model"}  # of which section a command takes settings
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


class Block(NamedTuple):
    page: Path
    line: int
    mark: str
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, text[: m.start()].count("\n") + 1, m[1] or "", m[2], m[3]) for m in BLOCK.finditer(text)]


EVERY = [block for page in PAGES for block in blocks(page)]


def test_every_block_is_run_or_says_why_not() -> None:
    assert len(EVERY) > 30
    for block in EVERY:
        kind, _, more = block.mark.partition(": ")
        assert kind in ("run", "run by", "not run", "no command"), f"{block.place}: say in a comment whether it is run"
        assert bool(more) == (kind in ("run by", "not run")), block.place
        if kind == "run by":
            path, _, test = more.partition("::")
            assert (ROOT / path).is_file(), block.place
            assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), block.place


def test_no_block_is_overlooked() -> None:
    for page in PAGES:
        fences = len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert fences == 2 * len(blocks(page)), page


def commands() -> Iterator[tuple[str, list[str]]]:
    """Where a command of ours stands, in a block or in a line, and its words."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        said = [(b.line, line) for b in blocks(page) if not b.language for line in b.text.splitlines()]
        outside = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
        said += [(text[: m.start()].count("\n") + 1, m[1]) for m in INLINE.finditer(outside)]
        for line, told in said:
            for part in re.split(r"&&|\||;|\$\(|\)", told.partition(" #")[0]):
                words = shlex.split(part) if part.count("'") % 2 == part.count('"') % 2 == 0 else []
                while words and "=" in words[0]:  # variables of the environment
                    words.pop(0)
                if words[:1] == ["florilegium"] and "…" not in part and "..." not in part:
                    yield f"{page.relative_to(ROOT)}:{line}", words[1:]


def test_every_command_that_is_shown_can_be_said() -> None:
    """Commands, options and arguments are those that there are, settings too, and bundled configs."""
    shown = list(commands())
    assert len(shown) > 60
    for place, words in shown:
        try:
            check_command(typer.main.get_command(app), words)
        except (click.ClickException, ConfigError) as error:
            raise AssertionError(f"{place}: florilegium {' '.join(words)}: {error}") from error


@pytest.mark.parametrize(
    "said",
    [
        "run --nope quickstart",
        "run quickstart privacy.nope=1",
        "run configs/nope.toml",
        "nope",
        "data nope",
        "data describe x data.nope=1",
    ],
)
def test_a_command_that_cannot_be_said_is_noticed(said: str) -> None:
    with pytest.raises((click.ClickException, ConfigError)):
        check_command(typer.main.get_command(app), said.split())


def check_command(command: click.Command, words: list[str]) -> None:
    name, parent = "florilegium", None
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        parent = click.Context(command, parent, info_name=name)
        name, found, words = command.resolve_command(parent, words)
        assert found is not None
        command = found
    if isinstance(command, click.Group):
        return  # a group is named as a whole
    params = command.make_parser(click.Context(command, parent, info_name=name)).parse_args(list(words))[0]
    given = params.get("overrides")
    keys = [setting.partition("=")[0] for setting in given] if isinstance(given, (list, tuple)) else []
    if name in ("run", "study"):
        file = str(params.get("config"))
        for key in keys:
            find_setting(key, kind_of_file(file))
        if file.startswith("configs/"):
            find_config(file)
    if section := OVERRIDDEN.get(name or ""):
        for key in keys:
            find_setting(f"{section}.{key.removeprefix(f'{section}.')}")


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.mark == "run" for b in blocks(p))], ids=lambda p: p.stem)
def test_what_is_shown_runs(page: Path, tmp_path: Path) -> None:
    """A page's blocks, one after the other in one folder."""
    place = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    place["FLORILEGIUM_HOME"] = str(tmp_path / "home")
    for block in blocks(page):
        if block.mark != "run":
            continue
        command = [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-euc", block.text]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **place}, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.place}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: no link leads nowhere, no name of the reference is missing."""
    pytest.importorskip("mkdocs", reason="the site needs pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "reference" / "lm" / "index.html").read_text(encoding="utf-8")
    assert "finetune" in reference and "Raises" in reference
