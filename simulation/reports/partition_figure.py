"""A page with how many replies of which label each user of a data set has: names of users and labels, no texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.partition_table import Share
from florilegium.simulation.reports.figures import figure

LABELS_DRAWN = 12


def partition_figure(parts: Sequence[Share]) -> go.Figure:
    """A bar for each user, a colour for each of the commonest labels; what is rarer is one colour together."""
    total = Counter[str]()
    for part in parts:
        total.update(dict(part.labels))
    common = [label for label, _ in total.most_common(LABELS_DRAWN)]
    users = [escape(part.user) for part in parts]
    traces = [
        go.Bar(name=escape(label or "no label"), x=users, y=[dict(part.labels).get(label, 0) for part in parts])
        for label in common
    ]
    if len(total) > len(common):
        rest = [part.replies - sum(dict(part.labels).get(label, 0) for label in common) for part in parts]
        traces.append(go.Bar(name=f"{len(total) - len(common)} others", x=users, y=rest, marker={"color": "#888"}))
    named = {"type": "category", "showticklabels": len(parts) <= 64}
    y_axis = {"title": {"text": "replies"}}
    return figure(traces, 480, "user", barmode="stack", showlegend=True, xaxis=named, yaxis=y_axis)


def write_picture(path: Path, parts: Sequence[Share]) -> None:
    """Writes one HTML file that loads nothing from elsewhere; raises `DataError` where there is one already."""
    if path.exists():
        raise DataError(f"{path} exists; name a new file")
    if not path.parent.is_dir():
        raise DataError(f"{path.parent} is no folder; name a file in one that is there")
    partition_figure(parts).write_html(path, include_plotlyjs=True)
