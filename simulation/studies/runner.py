"""Runs the cells of a study, of whatever kind, by processes of one thread each, or by this one alone.

A part of the work is a seed of a cell, or a cell where all its seeds are one pass. What parts of a seed have in common
(the base's figures, a task's adapter) is measured once in each process, and so a process keeps to its seeds while
there are any. A study that was killed goes on with the round, or the seed, that it was in; a cell with a result is not
run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from florilegium.simulation.engines.placement import Means, computed
from florilegium.simulation.engines.processes import BYTES_OF_ONE
from florilegium.simulation.engines.workers import Cohort
from florilegium.simulation.studies.baselines_cell import BaselinesCell
from florilegium.simulation.studies.cell import Seeded, SharedResources
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


@dataclass(frozen=True)
class StudyWork:
    """A study while its cells are run."""

    study: Study
    folder: Path
    bench: SharedResources
    listener: Listener

    def telling(self, listener: Listener) -> StudyWork:
        """The same, whose phases somebody else is told of."""
        return replace(self, listener=listener)

    def cell(self, key: str) -> SelectionCell | Seeded:
        """The cell in its folder."""
        cells, kind = self.study.cells, KINDS[self.study.config.kind]
        where = f"cell {list(cells).index(key) + 1} of {len(cells)}"
        return kind(cells[key], self._at(key), self.bench, lambda phase: self.listener(f"{where}: {phase}"))

    def parts(self, *, everything: bool = False) -> list[Cohort]:
        """What has no result yet, or all: cells by key, or a key and a seed."""

        def missing(key: str, name: str) -> bool:
            return everything or not (self._at(key) / f"{name}.json").exists()

        keys = [key for key in self.study.cells if missing(key, "result")]
        if not issubclass(KINDS[self.study.config.kind], Seeded):
            return [Cohort((key,), place) for place, key in enumerate(keys)]
        seeds = range(self.study.config.seeds)
        return [Cohort((key, str(n)), n) for key in keys for n in seeds if missing(key, f"seed{n}")]

    def _at(self, key: str) -> Path:
        return self.folder / "cells" / key


def run_part(work: StudyWork, part: Sequence[str], shared: None = None) -> None:
    """One of `StudyWork.parts`; what it found is in the cell's folder (a `Job`)."""
    key, *seed = part
    cell = work.cell(key)
    try:
        if isinstance(cell, Seeded) and seed:
            cell.kept(int(seed[0]))
        else:
            cell.run()
    except Exception as error:
        error.add_note(f"in {cell.folder}")
        raise


def run_study(study: Study, folder: Path, listener: Listener, bench: SharedResources | None = None) -> None:
    """Runs what has no result yet, on a bench that is `ready`, or is made so now.

    Raises what a cell raises, and `RunError` where processes are lost again and again; what others had begun is left
    where it is, as after a kill.
    """
    work = StudyWork(study, folder, bench or ready(study, folder), listener)
    if len(work.parts(everything=True)) > 1 and (parts := work.parts()):
        left = Counter(part.names[0] for part in parts)
        for part, _ in computed(work, run_part, parts, _means(work, parts)):
            key = part.names[0]
            left[key] -= 1
            if not left[key]:
                run_part(work, (key,))
    for key in study.cells:  # those whose seeds are there, and a study of a single part, which has all threads
        run_part(work, (key,))


def _means(work: StudyWork, parts: Sequence[Cohort]) -> Means:
    """The model of the first part is there then, for all processes."""
    lm = work.bench.model(work.study.cells[parts[0].names[0]].config.model)
    needed = BYTES_OF_ONE + lm.parameter_bytes  # another cell's model, in the place of this one
    return Means(work.study.config.workers, lm.engine.device, needed)
