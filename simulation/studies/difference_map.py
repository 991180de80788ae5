"""Where which arm differs from the one that all are compared with, and by how much: a table's comparisons as a map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from florilegium.simulation.reports.figures import figure
from florilegium.simulation.studies.config import TOGETHER, TableConfig
from florilegium.simulation.studies.statistics import LOWER_IS_BETTER, METRICS, Contrast, Entry, named
from florilegium.simulation.studies.study_report import difference

BETTER, EVEN, WORSE = "#1987ba", "#f4f1ea", "#d25440"


@dataclass(frozen=True)
class DifferenceMap:
    """Rows by columns of a table, each cell minus the one of its row that differs in `than`; None: none was made."""

    than: str
    metric: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Contrast | None]]

    @property
    def texts(self) -> list[list[str]]:
        """What stands in each cell: the mean difference ± half the 95 % interval, a star where it was shown."""
        return [[difference(c) or "–" for c in row] for row in self.cells]

    def drawn(self) -> go.Figure:
        """A heat map whose colours are symmetric about no difference."""
        low, high = (BETTER, WORSE) if self.metric in LOWER_IS_BETTER else (WORSE, BETTER)
        values = [[c.found.mean_difference if c else None for c in row] for row in self.cells]
        most = max((abs(v) for row in values for v in row if v is not None), default=1.0) or 1.0
        heat = go.Heatmap(
            z=values, x=list(self.columns), y=list(self.rows), text=self.texts, texttemplate="%{text}", zmin=-most,
            zmax=most, colorscale=[[0, low], [0.5, EVEN], [1, high]], textfont={"color": "#1d2024", "size": 11},
            colorbar={"title": {"text": "difference"}}, xgap=2, ygap=2,
            hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
        )  # fmt: skip
        return figure([heat], 120 + 34 * len(self.rows), "", yaxis={"autorange": "reversed"}, xaxis={"side": "top"})


def difference_maps(
    table: TableConfig, rows: Sequence[Sequence[Entry]], found: Sequence[Contrast]
) -> list[DifferenceMap]:
    """A map for each metric and setting that the table's cells are compared by; none for less than two by two."""
    if len(rows) < 2 or len(rows[0]) < 2:
        return []
    made = {(c.name, c.than, c.metric): c for c in found}
    across = sum(len(key.split(TOGETHER)) for key in table.rows)
    maps = []
    for metric in METRICS:
        for than in dict.fromkeys(c.than for c in found if c.metric == metric):
            cells = [[made.get((e.name, than, metric)) for e in row] for row in rows]
            names = [named(row[0].label[:across]) for row in rows]
            columns = [named(e.label[across:]) for e in rows[0]]
            maps.append(DifferenceMap(than, metric, names, columns, cells))
    return maps
