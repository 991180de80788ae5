"""`florilegium study`: a grid of arms and seeds with one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from florilegium.client.terminal import telling, wide
from florilegium.simulation.cli.app import console, interruptible
from florilegium.simulation.cli.completion import complete_config, complete_setting


def study(
    config: Annotated[str, typer.Argument(autocompletion=complete_config)],
    overrides: Annotated[list[str] | None, typer.Argument(autocompletion=complete_setting)] = None,
    studies: Annotated[Path, typer.Option(help="The folder that holds the studies.")] = Path("studies"),
) -> None:
    """Run a grid of arms and seeds and write one report to studies/NAME; a study that was stopped goes on.

    CONFIG is a TOML file with a section `study`, or the name of a bundled one. OVERRIDES are settings of all cells,
    unless a table fixes them, and of the study itself:

    florilegium study configs/selection/dolly.toml

    florilegium study selection/table name=small model.name=nano study.seeds=3 data.users=8
    """
    from florilegium.simulation.settings import find_config
    from florilegium.simulation.studies.config import load_study
    from florilegium.simulation.studies.preflight import ready

    planned = load_study(find_config(config), overrides or [])
    folder = studies / planned.name
    bench = ready(planned, folder)

    from florilegium.simulation.studies.runner import (
        run_study,  # and with it torch, now that nothing is left to refuse
    )
    from florilegium.simulation.studies.study_report import read_report

    stopped = f"stopped; what was finished is kept in {folder}: the same command goes on"
    with interruptible(stopped), telling(f"{planned.name}: loading") as tell:
        run_study(planned, folder, lambda phase: tell(f"{planned.name}: {phase}"), bench)
    report = read_report(planned, folder)
    wide(console, 120).print(report.text)
    console.print(f"report: {report.write(folder)}")
