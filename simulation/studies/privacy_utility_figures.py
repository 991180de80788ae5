"""What the report of a study of federations draws. A line is a way to protect; last on the axis is no noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from florilegium.simulation.evaluation.metrics import interval
from florilegium.simulation.reports.figures import figure
from florilegium.simulation.studies.figures import LOOKS
from florilegium.simulation.studies.privacy_utility import Outcome, Reach, but_noise

MODES = ("example-local", "user-local", "user-central", "example-distributed", "user-distributed")


def pareto(found: Sequence[Outcome]) -> go.Figure | None:
    """How much better than the base model, by the budget, for the shared adapter and with the personal one added."""
    epsilons = _epsilons(found)
    if len(epsilons) < 2:
        return None
    traces = []
    for number, mode in enumerate(MODES):
        for arm, dash in (("shared", "solid"), ("personal", "dot")):
            mine = [o for o in _of(found, mode) if arm in o.arms]
            gains = [o.gain(arm).tolist() for o in mine]
            half = [(b - a) / 2 for a, b in map(interval, gains)]
            traces.append(_line(f"{mode}, {arm}", mine, [sum(g) / len(g) for g in gains], half, number, dash))
    local = next((o for o in found if "local" in o.arms), None)
    if local:
        level = float(local.gain("local").mean())
        traces.append(
            go.Scatter(
                x=[*map(_named, epsilons)],
                y=[level] * len(epsilons),
                mode="lines",
                name="personal alone, nothing shared",
                line={"color": LOOKS[5][0], "width": 2, "dash": "dash"},
                hovertemplate="%{y:.4f}<extra></extra>",
            )
        )
    return _by_epsilon([t for t in traces if t], epsilons, "gain over the base model, nats per token")


def attack_success(found: Sequence[Outcome]) -> go.Figure | None:
    """AUC of the attack that did best, by the budget, and the ceiling."""
    epsilons = _epsilons(found)
    if len(epsilons) < 2 or not any(o.attacks for o in found):
        return None
    traces = []
    for number, mode in enumerate(MODES):
        mine = _of(found, mode)
        best = [max(o.attack(name) for name in o.attacks) for o in mine]
        traces.append(_line(f"{mode}, best attack", mine, [b[0] for b in best], [b[1] for b in best], number, "solid"))
        traces.append(_line(f"{mode}, ceiling", mine, [o.ceiling() for o in mine], None, number, "dot"))
    return _by_epsilon([t for t in traces if t], epsilons, "AUC of telling met from hidden dialogues")


def signal(found: Sequence[Reach]) -> go.Figure | None:
    """Signal to noise by the number of devices, in one line a cell."""
    traces = []
    for number, reach in enumerate(found):
        colour, symbol = LOOKS[number % len(LOOKS)]
        for part, dash in (("simulated", "solid"), ("rescaled", "dot")):
            inside = {n: r for n, r in reach.by_devices.items() if (n <= reach.simulated) == (part == "simulated")}
            if part == "rescaled":  # joined to the last one simulated
                last = max(n for n in reach.by_devices if n <= reach.simulated)
                inside = {last: reach.by_devices[last], **inside}
            traces.append(
                go.Scatter(x=list(inside), y=list(inside.values()), mode="lines+markers", name=reach.name,
                           line={"color": colour, "width": 2, "dash": dash}, legendgroup=reach.name,
                           showlegend=part == "simulated",
                           marker={"color": colour, "symbol": symbol, "size": 7 if part == "simulated" else 5},
                           hovertemplate=f"<b>{reach.name}</b> %{{x:,}} devices, {part}: %{{y:.2f}}<extra></extra>")
            )  # fmt: skip
    axes = {
        "xaxis": {"type": "log"},
        "yaxis": {"type": "log", "title": {"text": "signal to noise of the mean release"}},
    }
    return figure(traces, 420, "devices in a round", showlegend=True, **axes) if traces else None


def _of(found: Sequence[Outcome], mode: str) -> list[Outcome]:
    """The cells of a mode in the order of their budgets; last their twin without noise."""
    noisy = [o for o in found if o.config.privacy.mode == mode]
    keys = {but_noise(o) for o in noisy}
    plain = [o for o in found if o.config.privacy.mode == "none" and but_noise(o) in keys]
    return sorted([*noisy, *plain[:1]], key=_budget)


def _budget(o: Outcome) -> float:
    return math.inf if o.config.privacy.mode == "none" else o.config.privacy.epsilon


def _epsilons(found: Sequence[Outcome]) -> list[float]:
    return sorted({_budget(o) for o in found})


def _named(epsilon: float) -> str:
    return "no noise" if math.isinf(epsilon) else f"{epsilon:g}"


def _line(
    name: str, mine: Sequence[Outcome], values: Sequence[float], half: Sequence[float] | None, number: int, dash: str
) -> Any:
    colour, symbol = LOOKS[number % len(LOOKS)]
    if not mine:
        return None
    error = (
        {"error_y": {"type": "data", "array": list(half), "color": colour, "thickness": 1, "width": 3}} if half else {}
    )
    return go.Scatter(
        x=[_named(_budget(o)) for o in mine], y=list(values), name=name, mode="lines+markers",
        line={"color": colour, "width": 2, "dash": dash}, marker={"color": colour, "size": 7, "symbol": symbol},
        hovertemplate=f"<b>{name}</b>, ε %{{x}}: %{{y:.4f}}<extra></extra>", **error,
    )  # fmt: skip


def _by_epsilon(traces: list[Any], epsilons: Sequence[float], y_title: str) -> go.Figure:
    axis = {"type": "category", "categoryorder": "array", "categoryarray": [*map(_named, epsilons)]}
    return figure(traces, 460, "ε", showlegend=True, xaxis=axis, yaxis={"title": {"text": y_title}})
