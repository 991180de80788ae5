"""What a report draws and adds up: figures and totals, each a function of recorded events.

A figure is a plotly figure, or `None` where there is nothing to draw. Text in it takes its colour from the page, so
that one figure serves light and dark. What people wrote never enters a figure. Does not write HTML.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, TypeGuard

import plotly.graph_objects as go

from florilegium.simulation.runs.arms import ARMS, arm_of
from florilegium.simulation.runs.events import ArmComparison, DeviceResult, DeviceRound, Evaluation, RoundEnd
from florilegium.simulation.runs.summary import SUMMED

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, slots=True)
class DeviceTotal:
    """What one device sent and did over the recorded rounds."""

    device: str
    releases: int
    upload_bytes: int
    epsilon: float
    arrived: int
    accepted: int
    annotations: int
    synthetic_kept: int
    synthetic_rejected: int
    truncated: int
    tokens_trained: int
    odometer: tuple[tuple[int, float | None, str], ...]  # round, ε spent until then, why nothing was released


def is_number(value: object) -> TypeGuard[float]:
    """True for finite numbers only: a record may hold null, NaN or infinity."""
    return isinstance(value, int | float) and math.isfinite(value)


def ratio_in_words(ratio: object, floor: object) -> str:
    """A signal to noise; one that noise alone could seem to have is told as such.

    >>> ratio_in_words(0.0, 0.2), ratio_in_words(0.26, 0.2), ratio_in_words(None, None)
    ('not measurable, < 0.20', '0.26', 'no noise')
    """
    if not is_number(ratio):
        return "no noise"
    return f"not measurable, < {floor:.2f}" if is_number(floor) and ratio < floor else f"{ratio:.2f}"


def gains_by_arm(results: Sequence[DeviceResult]) -> dict[str, list[float]]:
    """NLL of the base minus NLL of each arm, nats per token, one value a user; positive is a gain.

    >>> nll = {"base": 4.0, "personal": 3.5}
    >>> gains_by_arm([DeviceResult(device="u1", arm=arm, nll=value, queries=8) for arm, value in nll.items()])
    {'personal': [0.5]}
    """
    base = {r.device: r.nll for r in results if r.arm == "base" and is_number(r.nll)}
    gains: dict[str, list[float]] = {name: [] for name in ARMS}
    for r in results:
        if r.arm != "base" and r.device in base and is_number(r.nll):
            gains.setdefault(r.arm, []).append(round(base[r.device] - r.nll, 5))
    return {arm: values for arm, values in gains.items() if values}


def device_totals(device_rounds: Sequence[DeviceRound]) -> list[DeviceTotal]:
    """Sums over rounds by device, the highest epsilon first. Annotations and epsilon are recorded cumulatively."""
    by_device: dict[str, list[DeviceRound]] = {}
    for e in device_rounds:
        by_device.setdefault(e.device, []).append(e)
    totals = [
        DeviceTotal(
            device=device,
            releases=sum(e.upload_bytes > 0 for e in events),
            epsilon=max((e.epsilon for e in events if e.epsilon is not None), default=math.nan),
            annotations=max(e.annotations for e in events),
            odometer=tuple((e.round, e.epsilon, e.refusal or "") for e in events),
            **{key: sum(getattr(e, key) or 0 for e in events) for key in (*SUMMED, "upload_bytes", "tokens_trained")},
        )
        for device, events in by_device.items()
    ]
    return sorted(totals, key=lambda t: (0.0 if math.isnan(t.epsilon) else -t.epsilon, t.device))


def spread(totals: Sequence[DeviceTotal], key: str) -> tuple[float, float, float, float] | None:
    """Lowest, median, highest and sum of one quantity over the devices; an infinite epsilon stays in."""
    values = [v for t in totals if not math.isnan(v := getattr(t, key))]
    return (min(values), median(values), max(values), sum(values)) if values else None


def mean_lengths(results: Sequence[DeviceResult]) -> dict[str, float]:
    """Mean length of an arm's replies over users, tokens."""
    lengths: dict[str, list[float]] = defaultdict(list)
    for r in results:
        if is_number(r.mean_length_tokens):
            lengths[r.arm].append(r.mean_length_tokens)
    return {arm: mean(values) for arm, values in lengths.items()}


def figure(traces: list[Any], height_px: int, x_title: str, **layout: Any) -> go.Figure:
    """The look that all figures share; margins grow with the labels."""
    axis = {"automargin": True, "zeroline": False, "fixedrange": True, "ticks": "", "gridcolor": "#888"}
    made = go.Figure(traces)
    made.update_layout(
        template="none", height=height_px, margin={"l": 8, "r": 12, "t": 8, "b": 8}, autosize=True,
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", hovermode="closest", showlegend=False,
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#6b6f76"},
        hoverlabel={"bgcolor": "#fffdf8", "bordercolor": "#8a8d92", "font": {"color": "#1d2024", "size": 13}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
    )  # fmt: skip
    made.update_xaxes(**axis, title={"text": x_title, "standoff": 10, "font": {"size": 13}})
    made.update_yaxes(**axis)
    made.update_layout(**layout)
    return made


def zero_line() -> dict[str, Any]:
    """The line between better and worse."""
    return {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 1.5}}


def learning_curves(evaluations: Sequence[Evaluation]) -> go.Figure | None:
    """Mean NLL over users by round. An arm that was evaluated once is a single mark."""
    points: dict[str, list[Evaluation]] = {name: [] for name in ARMS}
    for e in evaluations:
        if e.metric == "nll" and is_number(e.mean_per_user):
            points.setdefault(e.arm, []).append(e)
    traces = [_curve(arm, sorted(events, key=lambda e: e.round)) for arm, events in points.items() if events]
    last = max((e.round for e in evaluations), default=0)
    x_axis = {"dtick": 1 if last <= 12 else None, "range": [-0.03 * max(last, 1), 1.04 * max(last, 1)]}
    return figure(traces, 360, "round", showlegend=True, xaxis=x_axis) if traces else None


def _curve(name: str, events: list[Evaluation]) -> Any:
    arm = arm_of(name)
    hover = f"<b>{name}</b>, round %{{x}}<br>%{{y:.3f}} nats per token<extra></extra>"
    return go.Scatter(
        x=[e.round for e in events], y=[round(e.mean_per_user, 5) for e in events], name=name,
        mode="lines+markers" if len(events) > 1 else "markers", hovertemplate=hover, cliponaxis=False,
        line={"color": arm.colour, "width": 2, "dash": arm.dash},
        marker={"color": arm.colour, "size": 8, "symbol": arm.symbol},
    )  # fmt: skip


def differences(comparisons: Sequence[ArmComparison]) -> go.Figure | None:
    """Paired differences of NLL with their 95% intervals, one row a comparison; left of zero is better."""
    rows = [c for c in comparisons if c.metric == "nll" and is_number(c.mean_difference)]
    traces = []
    for c in rows:
        middle, arm, (low, high) = c.mean_difference, arm_of(c.better), c.ci95
        hover = f"<b>{c.better} {MINUS} {c.than}</b><br>%{{x:+.3f}} nats per token<extra></extra>"
        error = {"type": "data", "array": [high - middle], "arrayminus": [middle - low], "thickness": 2.5, "width": 6}
        marker = {"color": arm.colour, "size": 11, "symbol": arm.symbol}
        traces.append(
            go.Scatter(x=[middle], y=[f"{c.better} {MINUS} {c.than} "], mode="markers", marker=marker,
                       error_x=error | {"color": arm.colour}, hovertemplate=hover)
        )  # fmt: skip
    layout: dict[str, Any] = {"shapes": [zero_line()], "yaxis": {"autorange": "reversed"}}
    return figure(traces, 70 + 38 * len(rows), "difference of NLL, nats per token", **layout) if rows else None


def gain_distribution(results: Sequence[DeviceResult]) -> go.Figure | None:
    """One box an arm: the gains of all users over the base model; each user is a dot while they are few."""
    gains = gains_by_arm(results)
    traces = []
    for name, values in gains.items():
        colour = arm_of(name).colour
        traces.append(
            go.Box(x=values, y=[f"{name} "] * len(values), name=name, orientation="h",
                   line={"color": colour, "width": 1.5}, fillcolor=_faded(colour, 0.16),
                   marker={"color": colour, "size": 4, "opacity": 0.55},
                   boxpoints="all" if len(values) <= 300 else "outliers", jitter=0.7, pointpos=0,
                   hovertemplate="%{x:+.3f} nats per token<extra></extra>")
        )  # fmt: skip
    layout: dict[str, Any] = {"shapes": [zero_line()], "yaxis": {"autorange": "reversed"}, "boxgap": 0.35}
    return figure(traces, 80 + 62 * len(gains), "gain over base, nats per token", **layout) if gains else None


def epsilon_spent(device_rounds: Sequence[DeviceRound], budget: float | None) -> go.Figure | None:
    """Epsilon that the devices have spent by each round: the median, the range and the budget."""
    spent: dict[int, list[float]] = defaultdict(list)
    for e in device_rounds:
        if is_number(e.epsilon):
            spent[e.round].append(e.epsilon)
    if not spent:
        return None
    rounds = sorted(spent)
    hover = "round %{x}<br>%{fullData.name} ε %{y:.2f}<extra></extra>"
    colour = ARMS["shared"].colour
    lines: dict[str, Callable[[list[float]], float]] = {"lowest": min, "highest": max, "median": median}
    traces = [
        go.Scatter(x=rounds, y=[pick(spent[r]) for r in rounds], name=name, hovertemplate=hover, cliponaxis=False,
                   mode="lines+markers" if name == "median" or len(rounds) == 1 else "lines",
                   line={"color": colour, "width": 2.5 if name == "median" else 1},
                   fill="tonexty" if name == "highest" else None, fillcolor=_faded(colour, 0.14))
        for name, pick in lines.items()
    ]  # fmt: skip
    x_axis = {"dtick": 1 if rounds[-1] <= 12 else None, "range": [rounds[0] - 0.4, rounds[-1] + 0.4]}
    made = figure(traces, 260, "round", xaxis=x_axis, yaxis={"rangemode": "tozero"})
    if budget is not None:
        label = {"text": f"budget {budget:g}", "textposition": "end", "yanchor": "bottom"}
        line = {"width": 1.5, "dash": "dash"}
        made.add_shape(type="line", xref="paper", x0=0, x1=1, y0=budget, y1=budget, line=line, label=label)
        made.update_yaxes(range=[0, 1.15 * max(budget, *(max(values) for values in spent.values()))])
    return made


def seconds_by_phase(rounds: Sequence[RoundEnd]) -> dict[str, float]:
    """Seconds that each phase took over all recorded rounds, in the order in which the phases run."""
    total: dict[str, float] = defaultdict(float)
    for r in rounds:
        for phase, seconds in (r.seconds or {}).items():
            total[phase] += seconds
    return dict(total)


def timing(rounds: Sequence[RoundEnd]) -> go.Figure | None:
    """Total seconds by phase, as bars with their share."""
    total = seconds_by_phase(rounds)
    whole = sum(total.values())
    if not whole:
        return None
    bars = go.Bar(
        x=[round(s, 3) for s in total.values()], y=[f"{phase.replace('_', ' ')} " for phase in total],
        orientation="h", marker={"color": ARMS["base"].colour}, cliponaxis=False, textposition="outside",
        text=[f" {s:,.1f} s · {s / whole:.1%}" for s in total.values()], hovertemplate="%{y}%{x:.1f} s<extra></extra>",
    )  # fmt: skip
    x_axis = {"range": [0, 1.35 * max(total.values())], "showgrid": False, "showticklabels": False}
    y_axis = {"autorange": "reversed", "showgrid": False}
    return figure([bars], 24 + 30 * len(total), "", xaxis=x_axis, yaxis=y_axis, bargap=0.4)


def _faded(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
