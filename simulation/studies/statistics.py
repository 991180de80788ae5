"""From the results of cells to tables: means with intervals, paired tests, what it cost, the paper's figures beside.

A unit is a device of a seed; no device is in two seeds. Tests are paired t-tests over units; those of one table and
metric are one family, corrected by Holm (1979). Cells that differ in bins filled, replies asked for, optimizer steps
or, beyond a tenth, synthetic dialogues are shown, and kept out of the family: they are not compared at equal cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from florilegium.simulation.evaluation.metrics import Comparison, Measured, compare, holm, paired_p
from florilegium.simulation.studies.cell import Result, read_result
from florilegium.simulation.studies.config import Label, Study, TableConfig
from florilegium.simulation.studies.published import PUBLISHED

METRICS = {"nll": "NLL", "rouge1": "ROUGE-1"}
LOWER_IS_BETTER = {"nll", "mae", "rmse"}


@dataclass(frozen=True)
class Cost:
    """What a cell asked of one device on average, over all rounds."""

    bins: float
    annotations: float
    synthetic: float
    rejected: float
    steps: float
    tokens: float
    buffer_bytes: float
    failed: int  # devices whose training did not count, in any round
    seconds: float  # of the cell without the others, on the machine that the report names

    @classmethod
    def of(cls, result: Result) -> Cost:
        rounds, devices = result["rounds"], len(result["devices"])
        last = rounds[-1]
        seconds = sum(sum(r["seconds"].values()) + r["spared_s"] for r in rounds)

        def per_device(name: str) -> float:
            return float(sum(r[name] for r in rounds)) / devices

        return cls(
            bins=last["buffered"] / devices,
            annotations=last["annotations"] / devices,
            synthetic=per_device("synthetic_kept"),
            rejected=per_device("synthetic_rejected"),
            steps=per_device("personal_steps"),
            tokens=per_device("personal_tokens"),
            buffer_bytes=last["buffer_bytes"] / devices,
            failed=sum(len(r["failed"]) for r in rounds),
            seconds=seconds / devices,
        )


@dataclass(frozen=True)
class Entry:
    """A cell where it stands in a table."""

    label: Label
    nll: Measured
    shuffled: Measured
    rouge1: Measured | None
    length_tokens: float | None
    cost: Cost
    published: float | None
    result: Result

    @property
    def name(self) -> str:
        return named(self.label)

    def metric(self, name: str) -> Measured | None:
        return self.nll if name == "nll" else self.rouge1


@dataclass(frozen=True)
class Contrast:
    """A cell minus the one that differs from it in one setting, by unit."""

    name: str
    than: str
    metric: str
    found: Comparison
    seeds_better: int
    seeds: int
    p: float
    equal_cost: bool
    p_holm: float | None = None  # within the table's family

    @property
    def shown(self) -> bool:
        """Whether the corrected test shows a difference at 5 %."""
        return self.p_holm is not None and self.p_holm < 0.05

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or why neither is said."""
        if not self.shown:
            return "no difference shown" if self.equal_cost else "not at equal cost"
        lower = self.found.mean_difference < 0
        return "better" if lower == (self.metric in LOWER_IS_BETTER) else "worse"


def entry(study: Study, folder: Path, table: TableConfig, label: Label, override: str = "") -> Entry:
    """A cell's figures; raises `RunError` where it has not been run."""
    cell = study.cell(table, label, override)
    result = read_result(folder / "cells" / cell.key)
    rouge = result["rouge1"]
    return Entry(
        label,
        _measured(result["nll"]),
        _measured(result["nll_shuffled"]),
        _measured(rouge) if rouge else None,
        rouge.get("mean_length_tokens"),
        Cost.of(result),
        PUBLISHED[table.published](cell.config) if table.published else None,
        result,
    )


def entries(study: Study, folder: Path, table: TableConfig) -> list[list[Entry]]:
    """The table, row by row."""
    return [[entry(study, folder, table, label) for label in row] for row in table.labels()]


def contrasts(study: Study, folder: Path, table: TableConfig) -> list[Contrast]:
    """Every cell of a table against each of the settings that the table names, corrected within a metric."""
    found: list[Contrast] = []
    paired: set[frozenset[str]] = set()
    for label in (label for row in table.labels() for label in row):
        for override in table.against:
            pair = frozenset((study.cell(table, label).key, study.cell(table, label, override).key))
            if len(pair) == 2 and pair not in paired:
                paired.add(pair)
                own, other = entry(study, folder, table, label), entry(study, folder, table, label, override)
                found += [c for metric in METRICS if (c := _contrast(own, other, override, metric))]
    return [c for metric in METRICS for c in corrected([c for c in found if c.metric == metric])]


def contrast(
    name: str, than: str, metric: str, pair: tuple[Measured, Measured], seeds: Sequence[int], *, equal_cost: bool = True
) -> Contrast | None:
    """Two cells' units compared; None where a single unit has no interval. `seeds[k]` is that of unit k."""
    mine, theirs = pair
    if len(mine.by_user) < 2:
        return None
    differences, of_unit = np.array(mine.by_user) - np.array(theirs.by_user), np.array(seeds)
    sign = 1 if metric in LOWER_IS_BETTER else -1
    better = sum(bool(sign * differences[of_unit == s].mean() < 0) for s in set(seeds))
    p = paired_p(differences.tolist())
    found = compare(mine, theirs, lower_is_better=metric in LOWER_IS_BETTER)
    return Contrast(name, than, metric, found, better, len(set(seeds)), p, equal_cost)


def corrected(family: Sequence[Contrast]) -> list[Contrast]:
    """With Holm's p; at unequal cost, none."""
    p_holm = iter(holm([c.p for c in family if c.equal_cost]))
    return [replace(c, p_holm=next(p_holm) if c.equal_cost else None) for c in family]


def named(label: Label) -> str:
    """A label in short: the last part of each setting and its value; policies by name alone."""
    return ", ".join(str(v) if s == "selection.policy" else f"{s.rpartition('.')[2]} {v}" for s, v in label)


def spread(measured: Measured) -> str:
    """Mean over units ± half the 95 % interval."""
    low, high = measured.ci95
    return f"{measured.mean_per_user:.3f} ± {(high - low) / 2:.3f}"


def _measured(stored: dict[str, Any]) -> Measured:
    return Measured(tuple(stored["by_user"]), tuple(stored["by_query"]))


def _contrast(own: Entry, other: Entry, override: str, metric: str) -> Contrast | None:
    mine, theirs = own.metric(metric), other.metric(metric)
    if mine is None or theirs is None:
        return None
    equal = _equal_cost(own.cost, other.cost, but_synthesis=override.startswith("synthesis."))
    than = named((tuple(override.split("=", 1)),))  # type: ignore[arg-type]
    return contrast(own.name, than, metric, (mine, theirs), own.result["seeds"], equal_cost=equal)


def _equal_cost(one: Cost, other: Cost, *, but_synthesis: bool) -> bool:
    """Bins, annotations and steps are equal; synthetic dialogues to a tenth, since checks throw some away."""
    same = all(getattr(one, name) == getattr(other, name) for name in ("bins", "annotations", "steps"))
    if one.failed or other.failed or not same:
        return False
    return but_synthesis or abs(one.synthetic - other.synthetic) <= 0.1 * max(one.synthetic, other.synthetic)


def write_summary(
    folder: Path, study: Study, tables: Mapping[str, tuple[Sequence[Any], Sequence[Contrast]]], **more: Any
) -> None:
    """`summary.json`, the figures for programs: the cells of each table and their comparisons."""
    found = {
        "name": study.name,
        "seeds": study.config.seeds,
        "tables": {
            key: {"cells": list(cells), "contrasts": [{**asdict(c), "verdict": c.verdict} for c in contrasts]}
            for key, (cells, contrasts) in tables.items()
        },
        **more,
    }
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
