"""The tables and the page of a study of methods of personalisation, or of people who talk with their devices.

A unit is a person of a seed; nobody is in two seeds. Each cell of a table is compared with the table's first, and with
itself with what another person has. Tests are paired t-tests over units; those of one table, reference and metric are
one family, corrected by Holm (1979). Macro-F1 has no units and no test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console, Group, RenderableType

from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.hub import load
from florilegium.client.terminal import Figures
from florilegium.simulation.evaluation.metrics import Measured
from florilegium.simulation.heterogeneity.availability import trained_tokens
from florilegium.simulation.heterogeneity.classes import load_classes
from florilegium.simulation.personalization.config import InteractiveConfig, MethodsConfig
from florilegium.simulation.reports import html
from florilegium.simulation.reports.run_report import flattened
from florilegium.simulation.studies import figures
from florilegium.simulation.studies.cell import Result, read_result
from florilegium.simulation.studies.config import Label, Study, TableConfig
from florilegium.simulation.studies.statistics import Contrast, contrast, corrected, named, spread, write_summary

STRANGER = "with another's"
PHONE = "mid-phone"
NAMES = {"nll": "NLL", "accuracy": "accuracy", "f1": "macro-F1", "mae": "MAE", "rmse": "RMSE"}
IN_A_NAME = ("method.name", "method.retrieve", "method.retriever", "method.profile")


@dataclass(frozen=True)
class Outcome:
    """A cell where it stands in a table."""

    label: Label
    config: MethodsConfig | InteractiveConfig
    result: Result
    alone: bool = False  # whether no other cell of the table has the same method

    @property
    def name(self) -> str:
        """The method with what its prompts are given; where that names two cells, whatever else the table varies."""
        if isinstance(self.config, InteractiveConfig):
            return named(self.label)
        rest = named(tuple((s, v) for s, v in self.label if s not in IN_A_NAME))
        return self.method if self.alone or not rest else f"{self.method}, {rest}"

    @property
    def method(self) -> str:
        """With what its prompts are given."""
        if isinstance(self.config, InteractiveConfig):
            return ""
        method = self.config.method
        parts = [method.name, *([f"{method.retriever} {method.retrieve}"] if method.retrieve else [])]
        return " + ".join([*parts, *(["profile"] if method.profile else [])])

    @property
    def people(self) -> object:
        """What two cells must have in common for their people to be the same."""
        return self.config.task if isinstance(self.config, MethodsConfig) else self.config.data

    @property
    def seeds(self) -> list[int]:
        """Of each person."""
        return [n for n, s in enumerate(self.result["seeds"]) for _ in s["history"]]

    @cached_property
    def metrics(self) -> list[str]:
        """NLL and the task's."""
        return [m for m in self.result["seeds"][0]["arms"]["own"] if m != "mean_length_tokens"]

    def measured(self, metric: str = "nll", arm: str = "own") -> Measured | None:
        """By person and by query; None for a metric that one person does not have, or an arm that there is not."""
        found = [s["arms"].get(arm, {}).get(metric) for s in self.result["seeds"]]
        if not all(f and f["by_user"] for f in found):
            return None
        return Measured(*(tuple(v for f in found for v in f[by]) for by in ("by_user", "by_query")))

    def pooled(self, metric: str, arm: str = "own") -> float:
        """Over all queries of a seed, the mean over seeds."""
        return float(np.mean([s["arms"][arm][metric]["pooled"] for s in self.result["seeds"]]))

    @property
    def costs(self) -> dict[str, float | None]:
        """By name, mean over those seeds that have it; and what the tokens before the first question cost a phone."""
        every = [s["costs"] for s in self.result["seeds"]]
        had = {name: [c[name] for c in every if c[name] is not None] for name in every[0]}
        found = {name: float(np.mean(values)) if values else None for name, values in had.items()}
        return found | (on_a_phone(self.config.model, found) if "tokens trained" in found else {})

    @property
    def length_tokens(self) -> float:
        return float(np.mean([s["arms"]["own"]["mean_length_tokens"] for s in self.result["seeds"]]))

    def by_activity(self, metric: str = "nll") -> list[tuple[str, Measured]]:
        """Thirds of the people, by the items of their histories."""
        found, history = self.measured(metric), [n for s in self.result["seeds"] for n in s["history"]]
        if found is None or len(history) < 6:
            return []
        order = sorted(range(len(history)), key=lambda k: (history[k], k))
        thirds = [order[len(order) * t // 3 : len(order) * (t + 1) // 3] for t in range(3)]
        return [
            (f"{history[third[0]]}–{history[third[-1]]}", Measured(tuple(found.by_user[k] for k in third), ()))
            for third in thirds
        ]


def on_a_phone(model: ModelConfig, costs: Mapping[str, float | None]) -> dict[str, float | None]:
    """Seconds and joules of `PHONE` for a device's tokens trained, read and written, by the world's figures.

    They are for 135 million parameters and taken to grow with them; a written token counts as one that is read.
    """
    trained, read, written = (costs[f"tokens {kind}"] or 0.0 for kind in ("trained", "read", "written"))
    phone = next(c for c in load_classes("world/devices") if c.name == PHONE)
    work = trained_tokens(trained, read + written) * _parameters(model.name) / 135e6
    return {
        f"seconds of a {PHONE}": work / phone.train_tokens_per_s,
        f"joules of a {PHONE}": work * phone.joules_per_token,
    }


@lru_cache(maxsize=4)
def _parameters(model: str) -> int:
    return sum(p.numel() for p in load(model, dtype=torch.bfloat16, device="cpu")[0].parameters())


@dataclass(frozen=True)
class Shown:
    """A table of the study with its figures."""

    key: str
    table: TableConfig
    outcomes: list[Outcome]
    contrasts: list[Contrast]

    @property
    def metrics(self) -> dict[str, str]:
        """Those that all cells have, with their names."""
        common = [m for m in self.outcomes[0].metrics if all(m in o.metrics for o in self.outcomes)]
        return {m: NAMES.get(m, m) for m in common}

    def against(self, o: Outcome, metric: str = "nll", than: str = "") -> Contrast | None:
        """With the first cell of the same people, or with what another person has."""
        first = next(x for x in self.outcomes if x.people == o.people)
        wanted = (o.name, than or first.name, metric)
        return next((c for c in self.contrasts if (c.name, c.than, c.metric) == wanted), None)


def tables(study: Study, folder: Path) -> Iterator[Shown]:
    """The study's; raises `RunError` where a cell has not been run."""
    for key, table in study.config.tables.items():
        found = []
        for label in (label for row in table.labels() for label in row):
            cell = study.cell(table, label)
            assert isinstance(cell.config, MethodsConfig | InteractiveConfig)
            found.append(Outcome(label, cell.config, read_result(folder / "cells" / cell.key)))
        count = Counter(o.method for o in found)
        found = [replace(o, alone=count[o.method] == 1) for o in found]
        yield Shown(key, table, found, comparisons(found))


def comparisons(found: Sequence[Outcome]) -> list[Contrast]:
    """Every cell against the first one on the same task, and against itself with what another person has."""
    made: list[Contrast] = []
    for metric in found[0].metrics:
        family = [c for o in found if (c := _against_first(o, found, metric))]
        strange = [c for o in found if (c := _with_anothers(o, metric))]
        made += [*corrected(family), *corrected(strange)]
    return made


def _against_first(o: Outcome, found: Sequence[Outcome], metric: str) -> Contrast | None:
    first = next(x for x in found if x.people == o.people)
    if o is first or metric not in o.metrics or metric not in first.metrics:
        return None
    mine, theirs = o.measured(metric), first.measured(metric)
    return contrast(o.name, first.name, metric, (mine, theirs), o.seeds) if mine and theirs else None


def _with_anothers(o: Outcome, metric: str) -> Contrast | None:
    mine, theirs = (o.measured(metric, arm) if metric in o.metrics else None for arm in ("own", "shuffled"))
    if mine is None or theirs is None or mine == theirs:
        return None
    return contrast(o.name, STRANGER, metric, (mine, theirs), o.seeds)


def verdict(shown: Sequence[Shown]) -> list[str]:
    """What the corrected tests of the NLL and of the task's first metric show."""
    sentences = []
    for t in shown:
        for metric in list(t.metrics)[:2]:
            family = [c for c in t.contrasts if c.metric == metric and c.than != STRANGER]
            told = [f"{c.name} was {c.verdict}" for c in family if c.shown]
            unclear = [c.name for c in family if not c.shown]
            said = [*told, *([f"no difference shown: {', '.join(unclear)}"] if unclear else [])]
            if said:
                than = t.outcomes[0].name
                sentences.append(f"{t.table.title or t.key}, {t.metrics[metric]}, against {than}: {'; '.join(said)}.")
    return sentences


def render_study(study: Study, folder: Path) -> Path:
    """Writes `summary.json`, `tables.txt` and `report.html`; raises `RunError` where a cell has not been run."""
    shown = list(tables(study, folder))
    results = [o.result for t in shown for o in t.outcomes]
    write_summary(folder, study, {t.key: ([_cell(o) for o in t.outcomes], t.contrasts) for t in shown})
    with (folder / "tables.txt").open("w", encoding="utf-8") as stream:
        Console(file=stream, width=200).print(as_text(study, folder))
    plots = {
        f"{t.key}-differences-{i}": figures.differences([c for c in t.contrasts if c.than != STRANGER], metric, name)
        for t in shown
        for i, (metric, name) in enumerate(t.metrics.items())
    }
    return html.write(
        folder / "report.html", "personalization_study.html.j2", filters={"spread": spread}, study=study, shown=shown,
        plots={name: drawn for name, drawn in plots.items() if drawn is not None}, stranger=STRANGER,
        sentences=verdict(shown), units=sorted({len(r["devices"]) for r in results}),
        queries=sorted({r["queries"] for r in results}), hardware=sorted({r["hardware"] for r in results}),
        versions_of_code=len({r["sources"] for r in results}), config=list(flattened(dict(study.tree))),
    )  # fmt: skip


def _cell(o: Outcome) -> dict[str, Any]:
    """The figures for programs."""
    arms = {
        arm: {m: f.summary() if (f := o.measured(m, arm)) else {"pooled": o.pooled(m, arm)} for m in o.metrics}
        for arm in o.result["seeds"][0]["arms"]
    }
    return {
        "label": dict(o.label),
        "people": o.people.model_dump(mode="json"),  # type: ignore[attr-defined]
        "arms": arms,
        "mean_length_tokens": o.length_tokens,
        "by_activity": {name: m.mean_per_user for name, m in o.by_activity()},
        "costs": o.costs,
    }


def as_text(study: Study, folder: Path) -> RenderableType:
    """The tables for a terminal."""
    return Group(*(_drawn(study, t) for t in tables(study, folder)))


def _drawn(study: Study, t: Shown) -> RenderableType:
    people = len(t.outcomes[0].result["devices"])
    drawn = Figures(title=f"{t.table.title or t.key}: {study.config.seeds} seeds, {people} people", title_style="")
    of_task = list(t.metrics)[1:]
    costs = list(t.outcomes[0].costs)[:3]
    headings = ("cell", "NLL", "− first", STRANGER, *(t.metrics[m] for m in of_task), "reply", *costs)
    for heading in headings:
        drawn.add_column(heading, justify="left" if heading == "cell" else "right")
    for o in t.outcomes:
        own, other = o.measured(), o.measured("nll", "shuffled")
        assert own
        measured = (spread(m) if (m := o.measured(metric)) else f"{o.pooled(metric):.3f}" for metric in of_task)
        drawn.add_row(
            o.name, spread(own), _told(t.against(o)), f"{other.mean_per_user:.3f}" if other else "", *measured,
            f"{o.length_tokens:.1f}", *("–" if (v := o.costs[c]) is None else f"{v:.0f}" for c in costs),
        )  # fmt: skip
    return Group(drawn, "±: 95 % over people, paired where it is a difference; *: shown by Holm's test at 5 %")


def _told(c: Contrast | None) -> str:
    if c is None:
        return ""
    low, high = c.found.ci95
    return f"{c.found.mean_difference:+.3f} ± {(high - low) / 2:.3f}{'*' if c.shown else ''}"
