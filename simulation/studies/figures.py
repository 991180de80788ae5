"""What a study's report draws: paired differences, sweeps and learning curves, each with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from florilegium.simulation.evaluation.metrics import interval
from florilegium.simulation.reports.figures import MINUS, figure, is_number, zero_line
from florilegium.simulation.studies.config import SAME_PEOPLE
from florilegium.simulation.studies.statistics import METRICS, Contrast, Entry, named

Units = Sequence[float]  # a value a device

# Told apart in all three kinds of colour blindness, at least 3:1 on a white and on a dark page; symbols repeat them.
LOOKS = [
    ("#d25440", "circle"), ("#1987ba", "square"), ("#0b994b", "diamond"), ("#e347bd", "x"), ("#7d5f16", "triangle-up"),
    ("#7d8288", "circle-open"), ("#6a5acd", "cross"), ("#b8860b", "star"), ("#2f8f8f", "triangle-down"),
]  # fmt: skip


def differences(found: Sequence[Contrast], metric: str, called: str = "") -> go.Figure | None:
    """One row a contrast at equal cost; the mark is full where the corrected test shows a difference.

    Where no two cells have the same cost, all contrasts are drawn.
    """
    mine = [c for c in found if c.metric == metric]
    rows = [c for c in mine if c.equal_cost] or mine
    traces = []
    for c in rows:
        low, high = c.found.ci95
        middle, colour = c.found.mean_difference, LOOKS[["better", "worse"].index(c.verdict) if c.shown else 5][0]
        error = {"type": "data", "array": [high - middle], "arrayminus": [middle - low], "thickness": 2, "width": 5}
        traces.append(
            go.Scatter(x=[middle], y=[f"{c.name} {MINUS} {c.than} "], mode="markers", error_x=error | {"color": colour},
                       marker={"color": colour, "size": 9, "symbol": "circle" if c.shown else "circle-open"},
                       hovertemplate=f"%{{x:+.4f}}, {c.verdict}<extra></extra>")
        )  # fmt: skip
    unit = "difference of NLL, nats per token" if metric == "nll" else f"difference of {called or METRICS[metric]}"
    layout: dict[str, Any] = {"shapes": [zero_line()], "yaxis": {"autorange": "reversed"}}
    return figure(traces, 70 + 26 * len(rows), unit, **layout) if rows else None


def sweep(rows: Sequence[Sequence[Entry]], metric: str) -> go.Figure | None:
    """Lines over the columns where the last setting of the labels is a number that takes several values."""
    series: dict[str, list[tuple[float, Units]]] = {}
    for row in rows:
        points: list[tuple[float, Units]] = [
            (e.label[-1][1], m.by_user) for e in row if e.label and (m := e.metric(metric))
        ]
        if len(points) < 2 or not all(is_number(x) for x, _ in points):
            return None
        series[named(row[0].label[:-1])] = points
    return _lines(series, rows[0][0].label[-1][0], 340, _same_people(rows))


def curves(rows: Sequence[Sequence[Entry]]) -> go.Figure | None:
    """NLL by round, where it was measured in more than the last one."""
    series: dict[str, list[tuple[float, Units]]] = {}
    for e in (e for row in rows for e in row):
        before = [(r["round"], r["nll"]) for r in e.result["rounds"] if "nll" in r]
        series[e.name] = [*before, (len(e.result["rounds"]), e.nll.by_user)]
    longest = max(len(points) for points in series.values())
    return _lines(series, "round", 380, _same_people(rows), xaxis={"dtick": 1}) if longest > 1 else None


def _lines(
    series: dict[str, list[tuple[float, Units]]], x_title: str, height_px: int, same_people: bool, **layout: Any
) -> go.Figure:
    traces = []
    all_points = [units for points in series.values() for _, units in points]
    within = _within(all_points) if same_people else iter(all_points)
    for number, (name, points) in enumerate(series.items()):
        units = [next(within) for _ in points]
        traces.append(_line(name, [x for x, _ in points], units, number))
    return figure(traces, height_px, x_title, showlegend=True, **layout)


def _same_people(rows: Sequence[Sequence[Entry]]) -> bool:
    """Whether all cells have the same devices; where data differ, devices do."""
    changing = {setting.rpartition(".")[2] for setting in SAME_PEOPLE}
    data = [e.result["settings"]["data"] for row in rows for e in row]
    kept = [{k: v for k, v in d.items() if k not in changing} for d in data]
    return all(d == kept[0] for d in kept)


def _within(points: Sequence[Units]) -> Iterator[Units]:
    """Each device's values moved by how far the device is from the mean one: what is left is what cells change.

    So that an interval shows how sure a difference between cells is, not how different devices are (Cousineau 2005,
    with the correction of Morey 2008 for the number of points, which must be two or more).
    """
    values = np.array(points)  # (points, devices)
    own = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    return iter((values.mean(1, keepdims=True) + own * (len(values) / (len(values) - 1)) ** 0.5).tolist())


def _line(name: str, x: Sequence[float], units: Sequence[Units], number: int) -> Any:
    """Means with intervals."""
    colour, symbol = LOOKS[number % len(LOOKS)]
    means = [sum(values) / len(values) for values in units]
    half = [(b - a) / 2 for a, b in map(interval, units)]
    return go.Scatter(
        x=list(x), y=means, name=name, mode="lines+markers", line={"color": colour, "width": 2},
        marker={"color": colour, "size": 7, "symbol": symbol},
        error_y={"type": "data", "array": half, "color": colour, "thickness": 1, "width": 3},
        hovertemplate=f"<b>{name}</b> %{{x}}: %{{y:.3f}}<extra></extra>",
    )  # fmt: skip
