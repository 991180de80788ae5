"""The report of a study, of whatever kind: tables for a terminal, figures for programs, one page for people.

What is the same in all kinds stands here; an adapter for each kind says what its cells are and what was shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from rich.console import Console, Group, RenderableType

from florilegium.simulation.reports import html
from florilegium.simulation.reports.run_report import flattened
from florilegium.simulation.reports.tables import write_tables
from florilegium.simulation.studies import figures
from florilegium.simulation.studies.cell import read_result
from florilegium.simulation.studies.config import Label, Study, TableConfig
from florilegium.simulation.studies.statistics import LOWER_IS_BETTER, METRICS, Contrast, named, spread, write_summary

ADAPTERS = {  # by the study's kind
    "alone": "selection_report",
    "federated": "privacy_utility_report",
    "rivals": "baselines_report",
    "methods": "personalization_report",
    "lives": "personalization_report",
}


class Placed(Protocol):
    """A cell where it stands in a table."""

    @property
    def label(self) -> Label: ...

    @property
    def name(self) -> str: ...


Outcome = TypeVar("Outcome", bound=Placed)


@dataclass(frozen=True)
class Shown(Generic[Outcome]):
    """A table of the study with its comparisons."""

    key: str
    table: TableConfig
    outcomes: list[Outcome]
    contrasts: list[Contrast]

    @property
    def title(self) -> str:
        return self.table.title or self.key

    @property
    def metrics(self) -> Mapping[str, str]:
        """Those that are compared, with their names."""
        return METRICS

    @property
    def compared(self) -> Sequence[Contrast]:
        """The comparisons that have a figure."""
        return self.contrasts

    def contrast(self, name: str, than: str, metric: str = "nll") -> Contrast | None:
        return next((c for c in self.contrasts if (c.name, c.than, c.metric) == (name, than, metric)), None)


@dataclass(frozen=True)
class StudyReport(Generic[Outcome]):
    """What a kind of study adds to the frame."""

    study: Study
    shown: Sequence[Shown[Outcome]]
    template: str
    lead: str
    unit: str  # what it is, and what is the same for it in all cells
    units: str  # what the units are called
    facts: Mapping[str, str]
    sentences: Sequence[str]  # what the corrected tests show
    note: str  # what is drawn of the paired differences
    tables: Sequence[RenderableType]  # for a terminal
    cell: Callable[[Outcome], dict[str, Any]]  # figures for programs
    figures: Mapping[str, Any] = field(default_factory=dict)  # beside those of the differences; None: there is none
    values: Mapping[str, Any] = field(default_factory=dict)  # that its template needs
    summary: Mapping[str, Any] = field(default_factory=dict)  # beside tables, for programs

    @property
    def text(self) -> RenderableType:
        """The tables for a terminal."""
        return Group(*self.tables)

    def write(self, folder: Path) -> Path:
        """Writes `summary.json`, `tables.txt`, `report.html` and its tables as files; returns the page's path.

        Raises `RunError` where others' files lie in the folder `tables`.
        """
        cells = {t.key: ([self.cell(o) for o in t.outcomes], t.contrasts) for t in self.shown}
        write_summary(folder, self.study, cells, **self.summary)
        with (folder / "tables.txt").open("w", encoding="utf-8") as stream:
            Console(file=stream, width=200).print(self.text)
        results = [read_result(folder / "cells" / key) for key in self.study.cells]
        plots = {**self._differences(), **self.figures}
        page = html.write(
            folder / "report.html", self.template, filters={"spread": spread, "named": named},
            plots={name: drawn for name, drawn in plots.items() if drawn is not None}, report=self, study=self.study,
            shown=self.shown, lower_is_better=LOWER_IS_BETTER, hardware=sorted({r["hardware"] for r in results}),
            versions_of_code=len({r["sources"] for r in results}), config=list(flattened(dict(self.study.tree))),
            **self.values,
        )  # fmt: skip
        write_tables(page, folder / "tables")
        return page

    def _differences(self) -> dict[str, Any]:
        return {
            f"{t.key}-differences-{number}": figures.differences(t.compared, metric, called)
            for t in self.shown
            for number, (metric, called) in enumerate(t.metrics.items())
        }


def read_report(study: Study, folder: Path) -> StudyReport[Any]:
    """The report of a study; raises `RunError` where a cell has not been run."""
    adapter = import_module(f"florilegium.simulation.studies.{ADAPTERS[study.config.kind]}")
    report: StudyReport[Any] = adapter.report(study, folder)
    return report


def verdict(where: str, family: Sequence[Contrast]) -> Iterable[str]:
    """What the corrected tests of a family show, in a sentence; none where nothing was compared."""
    told = [f"{c.name} was {c.verdict}" for c in family if c.shown]
    unclear = [c.name for c in family if not c.shown]
    if said := [*told, *([f"no difference shown: {', '.join(unclear)}"] if unclear else [])]:
        yield f"{where}: {'; '.join(said)}."


def difference(c: Contrast | None) -> str:
    """In a cell of a table: mean ± half the 95 % interval, with a star where it was shown."""
    if c is None:
        return ""
    low, high = c.found.ci95
    return f"{c.found.mean_difference:+.3f} ± {(high - low) / 2:.3f}{'*' if c.shown else ''}"


def listed(values: Iterable[int]) -> str:
    """The different ones, in order."""
    return ", ".join(str(value) for value in sorted(set(values)))
