"""Runs the cells of a study, of whatever kind.

A study that was killed goes on with the round, or the seed, that it was in; a cell with a result is not run again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from florilegium.simulation.studies.baselines_cell import BaselinesCell
from florilegium.simulation.studies.cell import SharedResources
from florilegium.simulation.studies.config import Study
from florilegium.simulation.studies.federated_cell import FederatedCell
from florilegium.simulation.studies.interactive_cell import InteractiveCell
from florilegium.simulation.studies.methods_cell import MethodsCell
from florilegium.simulation.studies.preflight import ready
from florilegium.simulation.studies.selection_cell import Listener, SelectionCell

KINDS: dict[str, type[SelectionCell | FederatedCell | BaselinesCell | MethodsCell | InteractiveCell]] = {
    "alone": SelectionCell,
    "federated": FederatedCell,
    "rivals": BaselinesCell,
    "methods": MethodsCell,
    "lives": InteractiveCell,
}


def run_study(study: Study, folder: Path, listener: Listener, bench: SharedResources | None = None) -> None:
    """Runs what has no result yet, cell by cell, on a bench that is `ready`, or is made so now."""
    bench = bench or ready(study, folder)
    cells, kind = study.cells, KINDS[study.config.kind]
    for number, (key, cell) in enumerate(cells.items(), start=1):
        kind(cell, folder / "cells" / key, bench, partial(_tell, listener, f"cell {number} of {len(cells)}")).run()


def _tell(listener: Listener, where: str, phase: str) -> None:
    listener(f"{where}: {phase}")
