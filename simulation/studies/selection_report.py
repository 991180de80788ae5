"""The report of a study of policies, made from the cells' results alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from florilegium.client.terminal import Figures
from florilegium.simulation.studies import figures
from florilegium.simulation.studies.cell import read_result
from florilegium.simulation.studies.config import Study, TableConfig
from florilegium.simulation.studies.difference_map import DifferenceMap, difference_maps
from florilegium.simulation.studies.statistics import METRICS, Contrast, Entry, contrasts, entries, spread
from florilegium.simulation.studies.study_report import Shown, StudyReport, listed


@dataclass(frozen=True)
class Policies(Shown[Entry]):
    """A table whose cells stand in a grid."""

    rows: list[list[Entry]]

    @cached_property
    def maps(self) -> dict[str, DifferenceMap]:
        """By name: those of its comparisons that stand in rows and columns."""
        found = difference_maps(self.table, self.rows, self.contrasts)
        return {f"{self.key}-map-{number}": one for number, one in enumerate(found)}


def report(study: Study, folder: Path) -> StudyReport[Entry]:
    """What a study of policies shows; raises `RunError` where a cell has not been run."""
    shown = [_table(study, folder, key, table) for key, table in study.config.tables.items()]
    results = [read_result(folder / "cells" / key) for key in study.cells]
    return StudyReport(
        study,
        shown,
        template="selection_study.html.j2",
        lead=lead(shown),
        unit="A unit is a device: it has the same stream, the same held-out replies, the same first adapter and the "
        "same dice in every cell, and no device is in two seeds. Better or worse is said only where a paired t-test "
        "over units, corrected by Holm within the table and metric, is below 5 %.",
        units="Devices",
        facts={
            "Seeds": str(study.config.seeds),
            "Devices in a cell": listed(len(r["devices"]) for r in results),
            "Held-out replies in a cell": listed(r["queries"] for r in results),
        },
        sentences=_sentences(shown),
        note="Comparisons at equal cost, if there are any: mean over devices",
        tables=[_drawn(study, t) for t in shown],
        cell=_cell,
        figures={
            **{f"{t.key}-sweep-{metric}": figures.sweep(t.rows, metric) for t in shown for metric in METRICS},
            **{f"{t.key}-curves": figures.curves(t.rows) for t in shown},
            **{name: one.drawn() for t in shown for name, one in t.maps.items()},
        },
        values={"unequal": unequal, "rejected": _rejected(results)},
    )


def _table(study: Study, folder: Path, key: str, table: TableConfig) -> Policies:
    rows = entries(study, folder, table)
    return Policies(key, table, [e for row in rows for e in row], contrasts(study, folder, table), rows)


def _sentences(shown: Sequence[Policies]) -> list[str]:
    """One sentence a table and metric on what the corrected tests show."""
    sentences = []
    for t in shown:
        for metric, called in t.metrics.items():
            family = [c for c in t.contrasts if c.metric == metric and c.equal_cost]
            if family:
                told = [f"{c.name} was {c.verdict} than {c.than}" for c in family if c.shown]
                what = "; ".join(told) if told else "no difference was shown"
                where = f"{t.title}, {called}"
                sentences.append(f"{where}, {len(family)} comparisons at equal cost: {what}.")
    return sentences


def lead(shown: Sequence[Policies]) -> str:
    """The verdict in a line."""
    family = [c for t in shown for c in t.contrasts if c.equal_cost]
    if not family:
        return "No two cells were compared at equal cost."
    return f"{sum(c.shown for c in family)} of {len(family)} comparisons at equal cost show a difference."


def unequal(shown: Policies) -> list[str]:
    """What differs between the cells of a table of that which should be equal; the bounds differ by their nature."""
    found = []
    for what in ("bins", "annotations", "steps", "synthetic", "failed"):
        values = sorted({round(getattr(e.cost, what), 1) for e in shown.outcomes})
        if len(values) > 1:
            found.append(f"{what}: {', '.join(f'{v:g}' for v in values)}")
    return found


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


def _drawn(study: Study, t: Policies) -> RenderableType:
    shown = Figures(title=f"{t.title}: mean over {study.config.seeds} seeds' devices", title_style="")
    for heading in ("arm", "NLL", "under another's", "ROUGE-1", "paper's", "tokens", "asked", "synthetic", "steps"):
        shown.add_column(heading, justify="left" if heading == "arm" else "right")
    for e in t.outcomes:
        shown.add_row(
            e.name, spread(e.nll), f"{e.shuffled.mean_per_user:.3f}", spread(e.rouge1) if e.rouge1 else "–",
            f"{e.published:.3f}" if e.published else "", f"{e.length_tokens:.1f}" if e.length_tokens else "–",
            f"{e.cost.annotations:.0f}", f"{e.cost.synthetic:.1f}", f"{e.cost.steps:.0f}",
        )  # fmt: skip
    tests = [f"{c.metric}: {c.name} − {c.than}: {_told(c)}" for c in t.contrasts if c.shown]
    maps = [_map(one) for one in t.maps.values()]
    return Group(shown, *maps, "\n".join(tests or ["no difference shown by a corrected test at equal cost"]))


def _map(one: DifferenceMap) -> RenderableType:
    shown = Figures(title=f"{METRICS[one.metric]} − that of {one.than} ± 95 %, * shown", title_style="")
    shown.add_column("")
    for name in one.columns:
        shown.add_column(name, justify="right")
    for name, row in zip(one.rows, one.texts, strict=True):
        shown.add_row(name, *row)
    return shown


def _told(c: Contrast) -> str:
    low, high = c.found.ci95
    p = f"p = {c.p:.2g}" + (f", Holm {c.p_holm:.2g}" if c.p_holm is not None else "")
    return f"{c.found.mean_difference:+.4f} ({low:+.4f} … {high:+.4f}), {p}: {c.verdict}"
