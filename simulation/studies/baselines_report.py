"""The tables and the page of a study of rivals, made from the cells' results alone.

A unit is a device of a seed; no device is in two seeds. Every cell of a table is compared with its references, `ours`
and `local` without noise: paired t-tests over units, those of one table and metric corrected by Holm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType

from florilegium.client.terminal import Figures
from florilegium.simulation.baselines.config import BaselinesConfig
from florilegium.simulation.evaluation.metrics import Measured
from florilegium.simulation.studies.cell import Result, read_result
from florilegium.simulation.studies.config import Label, Study, TableConfig
from florilegium.simulation.studies.statistics import METRICS, Contrast, contrast, corrected, named, spread
from florilegium.simulation.studies.study_report import Shown, StudyReport, difference, listed, verdict

REFERENCES = ("ours", "local")


@dataclass(frozen=True)
class Outcome:
    """A rival where it stands in a table."""

    label: Label
    config: BaselinesConfig
    result: Result
    alone: bool = True  # whether no other cell of the table has the same rival

    @property
    def rival(self) -> str:
        return self.config.baseline.name

    @property
    def name(self) -> str:
        """The rival; where the table has it more than once, with all that the table varies."""
        rest = tuple(pair for pair in self.label if pair[0] != "baseline.name")
        return self.rival if self.alone else ", ".join([self.rival, *([named(rest)] if rest else [])])

    @property
    def epsilon(self) -> float | None:
        """Spent by a device over all rounds; none without protection."""
        found: float | None = self.result["seeds"][0]["epsilon"]
        return found

    def measured(self, arm: str = "own", metric: str = "nll") -> Measured | None:
        """Over the devices of all seeds; None where it was not measured."""
        found = [s["arms"].get(arm, {}).get(metric) for s in self.result["seeds"]]
        if not all(found):
            return None
        return Measured(*(tuple(v for f in found for v in f[by]) for by in ("by_user", "by_query")))

    def mean(self, what: str) -> float:
        """Over seeds, of `upload_bytes`, `download_bytes`, `kept_bytes`, `tokens` or `seconds`."""
        return float(np.mean([s[what] for s in self.result["seeds"]]))

    @property
    def seeds(self) -> list[int]:
        """Of each device."""
        return [n for n, s in enumerate(self.result["seeds"]) for _ in s["arms"]["own"]["nll"]["by_user"]]

    def by_seed(self, metric: str = "nll") -> list[float]:
        """Mean over the devices of each seed."""
        return [float(np.mean(s["arms"]["own"][metric]["by_user"])) for s in self.result["seeds"]]


@dataclass(frozen=True)
class Rivals(Shown[Outcome]):
    """A table of rivals beside the references."""

    def against(self, o: Outcome, than: str) -> Contrast | None:
        """Of the NLL."""
        return self.contrast(o.name, than)


def tables(study: Study, folder: Path) -> Iterator[Rivals]:
    """The study's; raises `RunError` where a cell has not been run."""
    for key, table in study.config.tables.items():
        found = list(_outcomes(study, folder, table))
        yield Rivals(key, table, found, contrasts(found))


def _outcomes(study: Study, folder: Path, table: TableConfig) -> Iterator[Outcome]:
    labels = [label for row in table.labels() for label in row]
    cells = [study.cell(table, label) for label in labels]
    rivals = Counter(cell.config.baseline.name for cell in cells if isinstance(cell.config, BaselinesConfig))
    for label, cell in zip(labels, cells, strict=True):
        assert isinstance(cell.config, BaselinesConfig)
        result = read_result(folder / "cells" / cell.key)
        yield Outcome(label, cell.config, result, rivals[cell.config.baseline.name] == 1)


def contrasts(found: Sequence[Outcome]) -> list[Contrast]:
    """Every cell against the first cell of each reference, corrected within a metric."""
    made = []
    for reference in REFERENCES:
        than = next((o for o in found if o.rival == reference and o.epsilon is None), None)
        made += [c for o in found if than and o is not than for m in METRICS if (c := _contrast(o, than, m))]
    return [c for metric in METRICS for c in corrected([c for c in made if c.metric == metric])]


def _contrast(o: Outcome, than: Outcome, metric: str) -> Contrast | None:
    one, two = o.measured(metric=metric), than.measured(metric=metric)
    if one is None or two is None:
        return None
    equal = o.mean("tokens") == than.mean("tokens")
    return contrast(o.name, than.rival, metric, (one, two), o.seeds, equal_cost=equal)


def report(study: Study, folder: Path) -> StudyReport[Outcome]:
    """What a study of rivals shows; raises `RunError` where a cell has not been run."""
    shown = list(tables(study, folder))
    results = [o.result for t in shown for o in t.outcomes]
    return StudyReport(
        study,
        shown,
        template="baselines_study.html.j2",
        lead="Schemes of personalisation on the same people, at the same number of steps.",
        unit="A unit is a device: it has the same stream, the same batches and the same held-out replies in every "
        "cell, and no device is in two seeds. Better or worse is said only where a paired t-test over units, "
        "corrected by Holm within the table and metric, is below 5 %.",
        units="Devices",
        facts={
            "Seeds": str(study.config.seeds),
            "Devices in a cell": listed(len(r["devices"]) for r in results),
            "Held-out replies in a cell": listed(r["queries"] for r in results),
        },
        sentences=list(_sentences(shown)),
        note="Mean over devices",
        tables=[_drawn(study, t) for t in shown],
        cell=_cell,
    )


def _sentences(shown: Sequence[Rivals]) -> Iterator[str]:
    """Of the NLL, for each table and reference."""
    for t in shown:
        for reference in REFERENCES:
            family = [c for c in t.contrasts if c.than == reference and c.metric == "nll"]
            yield from verdict(f"{t.title}, against {reference}", family)


def _cell(o: Outcome) -> dict[str, Any]:
    arms = {arm: m.summary() for arm in ("own", "base", "shuffled") if (m := o.measured(arm))}
    rouge = o.measured(metric="rouge1")
    costs = ("upload_bytes", "download_bytes", "kept_bytes", "tokens", "seconds")
    return {
        "label": dict(o.label),
        "nll": arms,
        "nll_by_seed": o.by_seed(),
        "rouge1": rouge.summary() if rouge else None,
        "epsilon": o.epsilon,
        **{what: o.mean(what) for what in costs},
    }


def _drawn(study: Study, t: Rivals) -> RenderableType:
    title = f"{t.title}: {study.config.seeds} seeds, {len(t.outcomes[0].result['devices'])} devices"
    drawn = Figures(title=title, title_style="")
    against = tuple(f"− {reference}" for reference in REFERENCES)
    headings = ("rival", "NLL", "by query", *against, "stranger's", "ROUGE-1", "ε", "kB up", "down", "tokens")
    for heading in headings:
        drawn.add_column(heading, justify="left" if heading == "rival" else "right")
    base = t.outcomes[0].measured("base")
    assert base is not None
    drawn.add_row("base", spread(base), f"{base.mean_per_query:.3f}", *[""] * (len(headings) - 3))
    for o in t.outcomes:
        own, other, rouge = o.measured(), o.measured("shuffled"), o.measured(metric="rouge1")
        assert own is not None
        drawn.add_row(
            o.name, spread(own), f"{own.mean_per_query:.3f}", *(difference(t.against(o, r)) for r in REFERENCES),
            f"{other.mean_per_user:.3f}" if other else "–", spread(rouge) if rouge else "–",
            "∞" if o.epsilon is None else f"{o.epsilon:.2f}", f"{o.mean('upload_bytes') / 1000:.0f}",
            f"{o.mean('download_bytes') / 1000:.0f}", f"{o.mean('tokens'):.0f}",
        )  # fmt: skip
    return Group(drawn, "±: 95 % over devices, paired where it is a difference; *: shown by Holm's test at 5 %")
