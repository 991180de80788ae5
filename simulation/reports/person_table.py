"""The table of a run's measures of persons on a terminal: whether the model has become its person's."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from florilegium.client.terminal import Figures
from florilegium.simulation.runs.arms import ARMS, PERSON
from florilegium.simulation.runs.events import PersonMeasure
from florilegium.simulation.runs.summary import RunSummary


def render_person(summary: RunSummary) -> RenderableType:
    """By measure the arms between floor and ceiling, and the personal one against the base and a stranger's.

    A star: shown at 5 % after Holm's correction over all comparisons of the table.
    """
    users = max(m.users for m in summary.person)
    arms = [arm for arm in ARMS if any(m.arm == arm for m in summary.person)]
    table = Figures(title=f"whose it is: {users} people", title_style="")
    for heading in ("measure", "floor", *arms, "ceiling", "− base", "− shuffled"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for metric in dict.fromkeys(m.metric for m in summary.person):
        found = {m.arm: m for m in summary.person if m.metric == metric}
        one = next(iter(found.values()))
        means = [_number(found[arm].mean_per_user if arm in found else None) for arm in arms]
        compared = [_against(summary, metric, than) for than in ("base", "shuffled")]
        table.add_row(_named(one), _number(one.floor), *means, _number(one.ceiling), *compared)
    notes = dict.fromkeys(f"{_named(m)}: {m.note}" for m in summary.person if m.note)
    return Group(table, Text("\n".join(notes))) if notes else table


def _named(measure: PersonMeasure) -> str:
    return PERSON[measure.metric][0] if measure.metric in PERSON else measure.metric


def _against(summary: RunSummary, metric: str, than: str) -> str:
    for c in summary.person_comparisons:
        if (c.metric, c.better, c.than) == (metric, "personal", than):
            half = (c.ci95[1] - c.ci95[0]) / 2
            return f"{c.mean_difference:+.3f} ± {half:.3f}{'*' * (c.p_holm < 0.05)}"
    return "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
