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
from rich.console import Group, RenderableType

from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.hub import load
from florilegium.client.terminal import Figures
from florilegium.simulation.evaluation.metrics import Measured
from florilegium.simulation.heterogeneity.availability import trained_tokens
from florilegium.simulation.heterogeneity.classes import load_classes
from florilegium.simulation.personalization.config import InteractiveConfig, MethodsConfig
from florilegium.simulation.studies.cell import Result, read_result
from florilegium.simulation.studies.config import Label, Study
from florilegium.simulation.studies.statistics import Contrast, contrast, corrected, named, spread
from florilegium.simulation.studies.study_report import Shown, StudyReport, difference, listed, verdict

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
class Methods(Shown[Outcome]):
    """A table of methods, each beside the first one on the same people."""

    @property
    def metrics(self) -> dict[str, str]:
        """Those that all cells have, with their names."""
        common = [m for m in self.outcomes[0].metrics if all(m in o.metrics for o in self.outcomes)]
        return {m: NAMES.get(m, m) for m in common}

    @property
    def compared(self) -> list[Contrast]:
        return [c for c in self.contrasts if c.than != STRANGER]

    def against(self, o: Outcome, metric: str = "nll", than: str = "") -> Contrast | None:
        """With the first cell of the same people, or with what another person has."""
        first = next(x for x in self.outcomes if x.people == o.people)
        return self.contrast(o.name, than or first.name, metric)


def tables(study: Study, folder: Path) -> Iterator[Methods]:
    """The study's; raises `RunError` where a cell has not been run."""
    for key, table in study.config.tables.items():
        found = []
        for label in (label for row in table.labels() for label in row):
            cell = study.cell(table, label)
            assert isinstance(cell.config, MethodsConfig | InteractiveConfig)
            found.append(Outcome(label, cell.config, read_result(folder / "cells" / cell.key)))
        count = Counter(o.method for o in found)
        found = [replace(o, alone=count[o.method] == 1) for o in found]
        yield Methods(key, table, found, comparisons(found))


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


def report(study: Study, folder: Path) -> StudyReport[Outcome]:
    """What a study of methods shows; raises `RunError` where a cell has not been run."""
    shown = list(tables(study, folder))
    results = [o.result for t in shown for o in t.outcomes]
    return StudyReport(
        study,
        shown,
        template="personalization_study.html.j2",
        lead="Methods of personalisation on the same people.",
        unit="A unit is a person, with the same history and the same questions in every cell; nobody is in two seeds. "
        "Better or worse is said only where a paired t-test over units, corrected by Holm within the table and metric, "
        "is below 5 %.",
        units="People",
        facts={
            "Seeds": str(study.config.seeds),
            "People in a cell": listed(len(r["devices"]) for r in results),
            "Questions in a cell": listed(r["queries"] for r in results),
        },
        sentences=list(_sentences(shown)),
        note="From the table's first cell: mean over people",
        tables=[_drawn(study, t) for t in shown],
        cell=_cell,
    )


def _sentences(shown: Sequence[Methods]) -> Iterator[str]:
    """Of the NLL and of the task's first metric."""
    for t in shown:
        for metric in list(t.metrics)[:2]:
            family = [c for c in t.compared if c.metric == metric]
            yield from verdict(f"{t.title}, {t.metrics[metric]}, against {t.outcomes[0].name}", family)


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


def _drawn(study: Study, t: Methods) -> RenderableType:
    people = len(t.outcomes[0].result["devices"])
    drawn = Figures(title=f"{t.title}: {study.config.seeds} seeds, {people} people", title_style="")
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
            o.name, spread(own), difference(t.against(o)), f"{other.mean_per_user:.3f}" if other else "", *measured,
            f"{o.length_tokens:.1f}", *("–" if (v := o.costs[c]) is None else f"{v:.0f}" for c in costs),
        )  # fmt: skip
    return Group(drawn, "±: 95 % over people, paired where it is a difference; *: shown by Holm's test at 5 %")
