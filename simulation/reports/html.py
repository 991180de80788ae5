"""Writes a page: one HTML file that loads nothing from elsewhere, with its figures and its numbers as text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.offline
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from florilegium.simulation.reports.figures import MINUS, is_number
from florilegium.simulation.runs.arms import ARMS

_MISSING = "\N{EN DASH}"


def write(
    path: Path, template: str, *, plots: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]], **values: Any
) -> Path:
    """Renders `template` to `path` at once or not at all; returns the path."""
    folders = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=folders, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    numbers = {"number": number, "signed": signed, "interval": interval, "size": size, "duration": duration}
    environment.filters |= {**numbers, **filters}
    page = environment.get_template(template).render(
        **values,
        petals=[arm.colour for arm in ARMS.values()],
        plots={name: Markup(figure.to_json()) for name, figure in plots.items()},  # plotly escapes < and >
        plotly_js=Markup(plotly.offline.get_plotlyjs()),
    )
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(page.encode("utf-8", "replace"))  # people's texts may hold half a surrogate pair
    os.replace(partial, path)
    return path


def number(value: Any, digits: int = 3) -> str:
    """Thousands apart, a true minus sign, a dash for what is missing."""
    if value == math.inf:
        return "∞"
    return f"{value:,.{digits}f}".replace("-", MINUS) if is_number(value) else _MISSING


def signed(value: Any) -> str:
    """With its sign, unless it rounds to zero."""
    text = number(value)
    if not is_number(value) or not float(f"{value:.3f}"):
        return text.removeprefix(MINUS)
    return text if value < 0 else f"+{text}"


def interval(bounds: Sequence[float] | None) -> str:
    return f"{signed(bounds[0])} to {signed(bounds[1])}" if bounds else "not known"


def size(count_bytes: Any) -> str:
    """Bytes in decimal units: `16512` is `16.5 kB`."""
    if not is_number(count_bytes):
        return _MISSING
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count_bytes >= 10**power:
            return f"{count_bytes / 10**power:,.1f} {unit}"
    return f"{count_bytes:,.0f} B"


def duration(seconds: Any) -> str:
    """`130.2` is `2 min 10 s`."""
    if not is_number(seconds):
        return _MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
