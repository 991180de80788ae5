"""What the command line is before anything is trained: quick to refuse, readable anywhere, honest about its faults."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from io import StringIO
from pathlib import Path

import click
import pytest
import typer
from rich.console import Console

from florilegium.client.terminal import Figures, telling
from florilegium.simulation.benchmarks import scale
from florilegium.simulation.cli import main
from florilegium.simulation.cli.bench import BENCHMARKS
from florilegium.simulation.config import load_config
from florilegium.simulation.runs.progress import progress_line
from florilegium.simulation.settings import config_folder

ROOT = Path(__file__).parent.parent
FLORILEGIUM = (sys.executable, "-m", "florilegium")
FIGURES = ("4.172 ± 0.093", "1,234,567", "0.1043 (−0.0130 … +0.2216)")

PROBE = """
import contextlib, io, json, sys
from florilegium.simulation.cli.main import main
found = []
for arguments in json.load(sys.stdin):
    sys.argv = ["florilegium", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            main()
            code = None
        except SystemExit as end:
            code = end.code
    found.append([code, sorted({"torch", "transformers", "flwr", "ray"} & set(sys.modules)), told.getvalue()])
print(json.dumps(found))
"""


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All of them, groups too."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(main.app)))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*FLORILEGIUM, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True)


# -- quick --------------------------------------------------------------------------------------------------------


def refused(folder: Path) -> list[list[str]]:
    """Commands that cannot do what is asked."""
    (folder / "there" / "device").mkdir(parents=True, mode=0o700)
    (folder / "there" / "file").touch()
    (folder / "unwhole" / "device.toml").parent.mkdir(mode=0o700)
    (folder / "unwhole" / "device.toml").write_text('name = "one"\n')
    broken, missing, study = folder / "broken.jsonl", str(folder / "missing"), folder / "study.toml"
    broken.write_text('{"user": "a", "prompt": "b", "response": "c"}\n{"user": \n')
    study.write_text(f'[data]\nname = "{broken}"\n[study.tables.one]\nrows = {{ "selection.bins" = [4, 8] }}\n')
    (folder / "model").mkdir()
    runs, home = ["--runs", str(folder)], ["--home", missing]
    return [
        ["run", "nope"],
        ["run", "quickstart", "selection.policy=nope"],
        ["run", "selection/dolly"],
        *(
            ["run", "quickstart", setting, *runs]
            for setting in (
                f"data.name={broken}",
                f"data.name={missing}.jsonl",
                "data.users=100000",
                "model.name=nanoo",
                "model.name=owner/name",
                f"model.name={folder}/model",
                'selection.lexicons=["none.toml"]',
                "world.classes=nope",
                "privacy.epsilon=1e-6",
                "shared.pool_capacity=0",
                "name=there",
            )
        ),
        ["run", "quickstart", "name=missing", "--resume", *runs],
        ["run", "quickstart", "--resume", "--overwrite", *runs],
        ["study", "quickstart"],
        ["study", str(study), "--studies", missing],
        ["study", "selection/table", "model.name=nanoo", "--studies", missing],
        ["study", "personal/methods", "model.name=nanoo", "--studies", missing],
        ["report", missing],
        ["audit", missing],
        ["config", "show", "quickstart", "selection.policy=nope"],
        ["config", "describe", "selection.polcy"],
        ["models", "pull", "nope"],
        ["models", "check", "nope"],
        ["models", "check", "nano", "weights=int2"],
        ["models", "pretrain", f"{missing}.toml"],
        ["models", "pretrain", "quickstart"],
        ["data", "describe", "nope"],
        ["data", "describe", str(broken)],
        ["data", "lexicons", "--source", "nope.toml"],
        ["bench", "engine", "--kinds", "nope"],
        ["bench", "engine", "--devices", "few"],
        ["bench", "engine", "--model", "nanoo"],
        ["bench", "selection", "--policies", "nope"],
        ["bench", "privacy", "--model", "nanoo"],
        ["bench", "scale", "--devices", "0"],
        ["bench", "board", "--models", "nanoo"],
        ["bench", "board", "--limits", "much"],
        ["bench", "board", "--generations", "nope"],
        ["server", "init", missing, "--name", "a", "--host", "a", "--model", "nanoo"],
        ["server", "init", missing, "--name", "a b", "--host", "a"],
        ["server", "init", missing, "--name", "a", "--host", "ä ö"],
        ["server", "start", missing],
        ["server", "register", missing],
        ["device", "init", "--home", str(folder / "there"), "--learn", "--no-federate"],
        ["device", "init", "--model", "nanoo", "--learn", "--no-federate", *home],
        ["device", "init", "--memory-limit", "1MiB", "--learn", "--no-federate", *home],
        ["device", "init", "--key", "nope", *home],
        ["device", "join", missing, "--server", "a:1", "--certificates", missing, *home],
        ["device", "serve", "--home", str(folder / "unwhole")],
        ["device", "chat", "hello", "--home", str(folder / "unwhole")],
        *(["device", name, *home] for name in ("serve", "page", "status", "dialogues", "learn", "leave", "ledger")),
        ["device", "chat", "hello", *home],
        ["device", "rate", "1", "--up", *home],
        ["device", "consent", "learn", "yes", *home],
        ["device", "export", str(folder / "mine.zip"), *home],
        ["device", "erase", "--yes", *home],
        ["device", "restore", "--yes", *home],
        ["device", "rebase", *home],
    ]


def asked(commands: list[list[str]]) -> list[tuple[int | None, list[str], str]]:
    """Exit code, heavy modules that were loaded, and what stood on stderr, all in one process."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=json.dumps(commands), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return [tuple(found) for found in json.loads(done.stdout)]


def test_what_is_refused_is_refused_in_a_line_before_a_model_library_is_loaded(tmp_path: Path) -> None:
    wanted = refused(tmp_path)
    for arguments, (code, loaded, told) in zip(wanted, asked(wanted), strict=True):
        assert code == 2, (arguments, code, told)
        assert not loaded, (arguments, loaded)
        assert told.startswith(("error:", "Usage:")) and "Traceback" not in told, (arguments, told)
    assert not (tmp_path / "missing").exists()


def test_what_only_looks_loads_no_model_library() -> None:
    wanted = [
        *([*path, "--help"] for path in COMMANDS), ["models", "list"], ["data", "list"], ["doctor"],
        ["data", "lexicons", "my doctor gave me a pill"], ["data", "describe", "chitchat"],
        ["config", "show", "quickstart"], ["config", "describe", "selection.policy"], ["config", "schema"],
    ]  # fmt: skip
    for arguments, (code, loaded, told) in zip(wanted, asked(wanted), strict=True):
        assert not code and not loaded, (arguments, code, loaded, told)


# -- benchmarks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_asked_what_its_options_give(name: str) -> None:
    benchmark = BENCHMARKS[name]
    module = import_module(f"florilegium.simulation.benchmarks.{benchmark.module}")
    here = {"models": "nano"} if name == "board" else {}  # the others' default comes with the package
    inspect.signature(module.measure).bind(*benchmark.options(**here), print)
    for told in (module.as_json, module.as_table):
        inspect.signature(told).bind("what was measured")


# -- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_help_page_says_what_was_written(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word, square brackets too, and none that was not."""
    command = COMMANDS[path]
    page = command.get_help(click.Context(command, info_name=path[-1] if path else "florilegium", max_content_width=99))
    shown = set(page.split())
    written = [command.help or "", *(getattr(p, "help", None) or "" for p in command.params)]
    assert not [word for text in written for word in text.split() if word not in shown]
    assert "\\" not in page


def test_an_extra_is_shown_with_its_brackets() -> None:
    assert b"'florilegium[bench]'" in run("bench", "engine", "--help", COLUMNS="100").stdout


# -- any output ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "ascii:strict", "utf-8"])
def test_an_encoding_that_lacks_a_character_ends_nothing(encoding: str) -> None:
    environment = {"PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    done = run("doctor", **environment)
    assert done.returncode == 0, done.stderr
    done = run("run", "Größe−Ж", **environment)
    assert done.returncode == 2 and done.stderr.startswith(b"error: config 'Gr"), done.stderr
    codec = encoding.partition(":")[0]
    expected = {"ascii": r"Gr\xf6\xdfe-\u0416", "cp1252": r"Größe-\u0416", "utf-8": "Größe−Ж"}
    assert expected[codec] in done.stderr.decode(codec)


def test_a_file_name_that_is_no_text_is_told() -> None:
    done = subprocess.run([*map(os.fsencode, FLORILEGIUM), b"data", b"describe", b"a\xff.jsonl"], capture_output=True)
    assert done.returncode == 2 and rb"a\udcff.jsonl" in done.stderr


def test_a_reader_that_has_gone_is_not_told_of() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*FLORILEGIUM, "data", "lexicons"], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writing)
    assert done.returncode == 1 and not done.stderr


# -- errors -------------------------------------------------------------------------------------------------------

RAISING = """
import sys
from florilegium.privacy.common.errors import UserError
from florilegium.simulation.cli import main as cli

@cli.app.command()
def broken() -> None:
    secret = "what a person" + " said"
    raise {error}

sys.argv = ["florilegium", "broken"]
cli.main()
"""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        ("UserError('set [a] b = 1')", 2, "error: set [a] b = 1\n"),
        ("KeyboardInterrupt", 130, ""),
        ("BrokenPipeError(32, 'Broken pipe')", 1, ""),
    ],
)
def test_an_error_that_is_not_ours_is_a_line_on_stderr(error: str, code: int, told: str) -> None:
    probe = RAISING.format(error=error)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr, done.stdout) == (code, told, "")


def test_a_fault_of_ours_is_a_traceback_and_the_request_to_report_it() -> None:
    """Of values, which may be what a person said, it shows none."""
    probe = RAISING.format(error="ZeroDivisionError('by nothing')")
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and not done.stdout
    *traceback, last = done.stderr.splitlines()
    assert traceback[0].startswith("Traceback") and traceback[-1] == "ZeroDivisionError: by nothing"
    assert "report it" in last and "florilegium doctor" in last
    assert "what a person said" not in done.stderr


# -- narrow -------------------------------------------------------------------------------------------------------


def printed(shown: object, width: int) -> list[str]:
    console = Console(width=width, file=StringIO(), markup=False)
    console.print(shown)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    return lines


@pytest.mark.parametrize("width", [44, 60, 80, 200])
def test_a_figure_is_never_cut(width: int) -> None:
    table = Figures("arm", title="a table [of] figures")
    for heading in ("NLL per user", "bytes in a round", "mean difference of the pairs"):
        table.add_column(heading, justify="right")
    table.add_row("personal", *FIGURES)
    table.add_row("base", "–", "", "")
    lines = printed(table, width)
    for text in ("a table [of] figures", "personal", *FIGURES):
        assert [line for line in lines if text in line], text
    assert "".join(lines).count("…") == 1  # that of the interval
    assert (len([line for line in lines if "NLL" in line]) == 1) == (width >= 80)  # a heading, or a line for each row


@pytest.mark.parametrize("width", [44, 60, 80, 200])
def test_a_benchmarks_figures_are_not_cut(width: int) -> None:
    rows = [scale.Scaled("florilegium", 10_000_000, 1_000_000, 1234.56, 987_650_000_000, 12345.6)]
    text = "\n".join(printed(scale.as_table(rows), width))
    for figure in ("10,000,000", "1,000,000", "1234.56", "987.65", "12345.6"):
        assert re.search(rf"(^|[^\d,.]){re.escape(figure)}($|[^\d,.])", text, re.MULTILINE), text


# -- a log --------------------------------------------------------------------------------------------------------


def test_a_log_has_a_line_for_each_round_and_the_phases_around_them() -> None:
    config = load_config(config_folder() / "quickstart.toml", ["data.users=3", "rounds=2"])
    console = Console(file=StringIO(), width=44)
    with progress_line(config, console) as progress:
        progress.enter("observe")
        for number in (1, 2):
            for visits in (2, 1, 3):  # two cohorts release, all adopt
                progress.enter("learn")
                progress.visit(visits)
            progress.end_round(number, tokens=1000)
        progress.enter("evaluate")
        progress.enter("evaluate")
    loading, observe, learn, one, two, evaluate = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert (loading, evaluate) == ("quickstart: loading", "quickstart: evaluate")
    assert (observe, learn) == ("quickstart: observe", "quickstart: learn")
    for number, line in enumerate((one, two), start=1):
        assert re.fullmatch(rf"quickstart: round {number} of 2, 3 devices, [\d.]+ s, [\d,]+ tokens/s, [\d.]+ GB", line)


def test_a_log_of_a_study_has_a_line_for_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    with telling("loading") as tell:
        for text in ("table: cell 1 of 2: observe", "table: cell 1 of 2: learn", "table: cell 2 of 2: [learn]", "end"):
            tell(text)
    told = capsys.readouterr()
    assert told.err.splitlines() == ["table: cell 1 of 2", "table: cell 2 of 2", "end"] and not told.out
