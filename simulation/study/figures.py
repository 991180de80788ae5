"""What a study's report draws: paired differences, sweeps and learning curves, each with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from simulation.evaluate import interval
from simulation.report_figures import MINUS, figure, is_number, zero_line
from simulation.study.tables import METRICS, Contrast, Entry, named

# Told apart in all three kinds of colour blindness, at least 3:1 on a white and on a dark page; symbols repeat them.
LOOKS = [
    ("#d25440", "circle"), ("#1987ba", "square"), ("#0b994b", "diamond"), ("#e347bd", "x"), ("#7d5f16", "triangle-up"),
    ("#7d8288", "circle-open"), ("#6a5acd", "cross"), ("#b8860b", "star"), ("#2f8f8f", "triangle-down"),
]  # fmt: skip


def differences(found: Sequence[Contrast], metric: str) -> go.Figure | None:
    """One row a contrast; the mark is full where the corrected test shows a difference."""
    rows = [c for c in found if c.metric == metric]
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
    unit = "difference of NLL, nats per token" if metric == "nll" else f"difference of {METRICS[metric]}"
    layout: dict[str, Any] = {"shapes": [zero_line()], "yaxis": {"autorange": "reversed"}}
    return figure(traces, 70 + 26 * len(rows), unit, **layout) if rows else None


def sweep(rows: Sequence[Sequence[Entry]], metric: str) -> go.Figure | None:
    """Lines over the columns where the last setting of the labels is a number that takes several values."""
    points = [[(e.label[-1][1], e) for e in row if e.label] for row in rows]
    if not all(len(row) > 1 and all(is_number(x) for x, _ in row) for row in points):
        return None
    traces = []
    for number, row in enumerate(points):
        known = [(x, m) for x, e in row if (m := e.metric(metric))]
        traces.append(_line(named(row[0][1].label[:-1]), [x for x, _ in known], [m.by_user for _, m in known], number))
    setting = points[0][0][1].label[-1][0]
    return figure(traces, 340, setting, showlegend=True)


def curves(rows: Sequence[Sequence[Entry]]) -> go.Figure | None:
    """NLL by round, where it was measured in more than the last one."""
    traces = []
    for number, e in enumerate(e for row in rows for e in row):
        by_round = [(r["round"], r["nll"]) for r in e.result["rounds"] if "nll" in r]
        by_round.append((len(e.result["rounds"]), list(e.nll.by_user)))
        traces.append(_line(e.name, [x for x, _ in by_round], [y for _, y in by_round], number))
    most = max(len(t.x) for t in traces)
    return figure(traces, 380, "round", showlegend=True, xaxis={"dtick": 1}) if most > 1 else None


def _line(name: str, x: Sequence[float], units: Sequence[Sequence[float]], number: int) -> Any:
    """Means with intervals; lines beside each other are moved apart by nothing: their marks differ."""
    colour, symbol = LOOKS[number % len(LOOKS)]
    means = [sum(values) / len(values) for values in units]
    half = [(b - a) / 2 for a, b in map(interval, units)]
    return go.Scatter(
        x=list(x), y=means, name=name, mode="lines+markers", line={"color": colour, "width": 2},
        marker={"color": colour, "size": 7, "symbol": symbol},
        error_y={"type": "data", "array": half, "color": colour, "thickness": 1, "width": 3},
        hovertemplate=f"<b>{name}</b> %{{x}}: %{{y:.3f}}<extra></extra>",
    )  # fmt: skip
