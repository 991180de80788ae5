"""`florilegium export`: what a run has left, as tables for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from florilegium.simulation.cli.app import console


def export(
    run: Path,
    out: Annotated[Path | None, typer.Argument(help="A new folder; not given: tables in that of the run.")] = None,
    parquet: Annotated[bool, typer.Option("--parquet/--csv", help="Of which kind the files are.")] = False,
) -> None:
    """Write a run's events as tables, a file for each kind: evaluation.csv, result.csv, device_round.csv, …

    RUN is the folder of the run, also of one that is not finished: florilegium export runs/quickstart --parquet

    The table "replies" holds what people said.
    """
    from florilegium.simulation.results import export_run
    from florilegium.simulation.runs.folder import RunFolder

    written = export_run(run, out or run / "tables", parquet=parquet)
    for path, rows in written.items():
        console.print(f"{path}: {rows:,} rows", soft_wrap=True)
    if not (run / "summary.json").is_file():
        console.print(f"the run is not finished: these are its events up to now, {RunFolder(run).done} rounds are done")
