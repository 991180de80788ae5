"""`florilegium run`, `report` and `audit`: one federation, its page, and what attacks on it achieve."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from florilegium.client.terminal import telling
from florilegium.simulation.cli.app import console, interruptible
from florilegium.simulation.cli.completion import complete_config, complete_setting


def run(
    config: Annotated[str, typer.Argument(autocompletion=complete_config)],
    overrides: Annotated[list[str] | None, typer.Argument(autocompletion=complete_setting)] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a run of the same name.")] = False,
    runs: Annotated[Path, typer.Option(help="The folder that holds the runs.")] = Path("runs"),
) -> None:
    """Simulate a federation and write its report to runs/NAME.

    CONFIG is a TOML file, the name of a bundled config or, with --resume, the folder of a run. OVERRIDES are settings,
    named as in a run's config.toml:

    florilegium run quickstart

    florilegium run quickstart name=fifo selection.policy=fifo privacy.epsilon=4 data.users=100

    florilegium run my.toml model.name=smollm2-135m data.name=chats.jsonl --runs /big/disk

    florilegium run quickstart callbacks=tensorboard

    florilegium run --resume runs/quickstart
    """
    from florilegium.simulation.data.population import told_of
    from florilegium.simulation.devices.preflight import ready
    from florilegium.simulation.runs.folder import find_run
    from florilegium.simulation.runs.progress import progress_line, tell_data

    settings, folder = find_run(config, overrides or [], runs, resuming=resume)
    people = ready(settings, folder, resuming=resume, overwrite=overwrite)
    tell_data(told_of(people), console)

    from florilegium.simulation.experiment import (
        run_experiment,  # and with it torch, now that nothing is left to refuse
    )
    from florilegium.simulation.reports.terminal import render_summary

    with interruptible("stopped before anything was begun"), progress_line(settings, console) as progress:
        summary = run_experiment(
            settings,
            folder,
            resuming=resume,
            overwrite=overwrite,
            progress=progress,
            people=people,
        )
    console.print(render_summary(summary))
    console.print(f"report: {folder / 'report.html'}")


def report(run: Path) -> None:
    """Make report.html of a run again, also of one that was stopped.

    RUN is the folder of the run: florilegium report runs/quickstart
    """
    from florilegium.simulation.reports.run_report import render_report

    console.print(f"report: {render_report(run)}")


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

    with interruptible(), telling("auditing") as tell:
        found = audit_run(RunFolder(run), devices, canaries, tell)
    if json:
        from florilegium.simulation.audit.audit import as_json

        print(dumps(as_json(found)))
    else:
        console.print(f"claimed ε {found.epsilon_claimed:.2f}, lower bound {found.epsilon_lower:.2f}")
        console.print(f"{'passed' if found.passed else 'NOT passed'}: {run / 'audit.html'}")
    raise typer.Exit(0 if found.passed else 1)
