"""Writes the report of a study: one page that loads nothing from elsewhere, made from the cells' results alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from florilegium.simulation.reports import html
from florilegium.simulation.reports.run_report import flattened
from florilegium.simulation.studies import figures
from florilegium.simulation.studies.cell import read_result
from florilegium.simulation.studies.config import Study, TableConfig
from florilegium.simulation.studies.statistics import (
    METRICS,
    Contrast,
    Entry,
    contrasts,
    entries,
    named,
    spread,
    write_summary,
)


@dataclass(frozen=True)
class Shown:
    """A table of the study with its figures."""

    key: str
    table: TableConfig
    rows: list[list[Entry]]
    contrasts: list[Contrast]

    @property
    def entries(self) -> list[Entry]:
        return [e for row in self.rows for e in row]


def render_study(study: Study, folder: Path) -> Path:
    """Writes `summary.json` and `report.html`; raises `RunError` where a cell has not been run."""
    shown = [
        Shown(key, table, entries(study, folder, table), contrasts(study, folder, table))
        for key, table in study.config.tables.items()
    ]
    write_summary(folder, study, {t.key: ([_cell(e) for e in t.entries], t.contrasts) for t in shown})
    results = [read_result(folder / "cells" / key) for key in study.cells]
    return html.write(
        folder / "report.html", "selection_study.html.j2", 
        filters={"spread": spread, "named": named}, plots=_plots(shown),
        study=study, shown=shown, metrics=METRICS, lead=lead(shown), sentences=verdict(shown), unequal=unequal,
        units=sorted({len(r["devices"]) for r in results}), queries=sorted({r["queries"] for r in results}),
        hardware=sorted({r["hardware"] for r in results}),
        versions_of_code=len({r["sources"] for r in results}), rejected=_rejected(results),
        config=list(flattened(dict(study.tree))),
    )  # fmt: skip


def verdict(shown: Sequence[Shown]) -> list[str]:
    """One sentence a table and metric on what the corrected tests show."""
    sentences = []
    for t in shown:
        for metric, called in METRICS.items():
            family = [c for c in t.contrasts if c.metric == metric and c.equal_cost]
            if family:
                told = [f"{c.name} was {c.verdict} than {c.than}" for c in family if c.shown]
                what = "; ".join(told) if told else "no difference was shown"
                where = f"{t.table.title or t.key}, {called}"
                sentences.append(f"{where}, {len(family)} comparisons at equal cost: {what}.")
    return sentences


def lead(shown: Sequence[Shown]) -> str:
    """The verdict in a line."""
    family = [c for t in shown for c in t.contrasts if c.equal_cost]
    if not family:
        return "No two cells were compared at equal cost."
    return f"{sum(c.shown for c in family)} of {len(family)} comparisons at equal cost show a difference."


def unequal(shown: Shown) -> list[str]:
    """What differs between the cells of a table of that which should be equal; the bounds differ by their nature."""
    found = []
    for what in ("bins", "annotations", "steps", "synthetic", "failed"):
        values = sorted({round(getattr(e.cost, what), 1) for e in shown.entries})
        if len(values) > 1:
            found.append(f"{what}: {', '.join(f'{v:g}' for v in values)}")
    return found


def _plots(shown: Sequence[Shown]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for t in shown:
        for metric in METRICS:
            made[f"{t.key}-differences-{metric}"] = figures.differences(t.contrasts, metric)
            made[f"{t.key}-sweep-{metric}"] = figures.sweep(t.rows, metric)
        made[f"{t.key}-curves"] = figures.curves(t.rows)
    return {name: drawn for name, drawn in made.items() if drawn is not None}


def _rejected(results: Sequence[dict[str, Any]]) -> Counter[str]:
    """Why synthetic dialogues were thrown away, over all cells."""
    reasons = Counter[str]()
    for result in results:
        for r in result["rounds"]:
            reasons.update(r["synthetic_reasons"])
    return reasons


def _cell(e: Entry) -> dict[str, Any]:
    return {
        "label": dict(e.label),
        "nll": e.nll.summary(),
        "nll_shuffled": e.shuffled.summary(),
        "rouge1": e.rouge1.summary() if e.rouge1 else None,
        "mean_length_tokens": e.length_tokens,
        "published_rouge1": e.published,
        "cost": asdict(e.cost),
    }
