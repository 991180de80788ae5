"""Writes the report of a run: one HTML file that loads nothing from elsewhere, made from `metrics.jsonl` alone.

The verdict is plain sentences: an arm is called better or worse only when the 95% interval of its paired
difference leaves zero out. Does not compute any metric; what was not recorded is shown as missing.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from florilegium.privacy.common.errors import UserError
from florilegium.simulation.reports import figures as figures
from florilegium.simulation.reports import html
from florilegium.simulation.reports.figures import ARMS, Event, arm_of, is_number
from florilegium.simulation.reports.html import interval, signed
from florilegium.simulation.runs.mean_observer import bystander

MOST_DEVICES_LISTED = 200
_IDENTITY = ("event", "round", "device", "arm", "metric", "better", "than", "prompt", "what")
_METRIC_NAMES = {"nll": "NLL", "rouge1": "ROUGE-1"}


# What the verdict answers, in this order; every other comparison is in the page's table.
_ASKED = [
    ("nll", "shared", "base"), ("nll", "personal", "base"), ("nll", "personal", "shared"), ("nll", "personal", "local"),
    ("nll", "personal", "shuffled"), ("rouge1", "shared", "base"), ("rouge1", "personal", "base"),
]  # fmt: skip


class ReportError(UserError):
    """The record of a run is missing or damaged."""


@dataclass(frozen=True, slots=True)
class Record:
    """The events of a run by kind, rounds in order. What was repeated after a crash is there once, as last recorded."""

    run: Event
    end: Event
    device_round: tuple[Event, ...]
    round: tuple[Event, ...]
    evaluation: tuple[Event, ...]
    result: tuple[Event, ...]
    comparison: tuple[Event, ...]
    replies: tuple[Event, ...]
    newcomers: tuple[Event, ...]
    newcomers_comparison: tuple[Event, ...]
    fairness: tuple[Event, ...]
    failure: tuple[Event, ...]

    @property
    def rounds_done(self) -> int:
        return int(self.round[-1]["round"]) if self.round else 0

    def comparing(self, metric: str, better: str, than: str = "base") -> Event | None:
        """The paired comparison of two arms, if it was recorded and is a number."""
        wanted = (metric, better, than)
        found = (c for c in self.comparison if (c["metric"], c["better"], c["than"]) == wanted)
        return next((c for c in found if is_number(c["mean_difference"])), None)

    def latest(self, metric: str) -> dict[str, Event]:
        """The last evaluation of each arm, in the order of `ARMS`."""
        found = {e["arm"]: e for e in self.evaluation if e["metric"] == metric}
        return {arm: found[arm] for arm in [*ARMS, *sorted(found.keys() - ARMS.keys())] if arm in found}


def read_events(path: Path) -> list[Event]:
    """One event a line. A last line that was torn by a crash is left out; damage elsewhere is an error."""
    if not path.exists():
        raise ReportError(f"{path} is missing; give the folder of a run, the one that holds metrics.jsonl")
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ReportError(f"{path}, line {number} is not JSON ({error}); remove that line to go on") from error
    return events


def collect(events: Sequence[Event]) -> Record:
    """Sorts events by kind. Of events with the same identity the last one holds; an end before a restart does not."""
    last = {tuple(str(e.get(key)) for key in _IDENTITY): e for e in events}
    run: Event = {}
    end: Event = {}
    for event in events:
        if event["event"] == "run":
            run, end = event, {}
        elif event["event"] == "end":
            end = event
    kinds = [f.name for f in fields(Record) if f.name not in ("run", "end")]
    ordered = sorted(last.values(), key=lambda e: int(e.get("round", 0)))
    return Record(run, end, **{kind: tuple(e for e in ordered if e["event"] == kind) for kind in kinds})


# ---- the verdict ----


def outcome(comparison: Event) -> str:
    """`better`, `worse`, or `unclear` when the 95% interval contains zero or is not known.

    >>> outcome({"metric": "nll", "ci95": [-0.06, -0.04]}), outcome({"metric": "rouge1", "ci95": [-0.01, 0.02]})
    ('better', 'unclear')
    """
    low, high = comparison.get("ci95") or (math.nan, math.nan)
    if high < 0:
        return "better" if comparison["metric"] == "nll" else "worse"
    if low > 0:
        return "worse" if comparison["metric"] == "nll" else "better"
    return "unclear"


def verdict(events: Sequence[Event]) -> list[str]:
    """Plain sentences on what the run showed; the first one stands for all of them.

    An arm whose interval contains zero is called not better, never nearly better.
    """
    record = collect(events)
    found = [c for asked in _ASKED if (c := record.comparing(*asked))]
    sentences = [*_progress(record), *_summary(record), *(_sentence(c) for c in found), *_cost(record)]
    return sentences or ["The run has recorded nothing yet."]


def _progress(record: Record) -> Iterator[str]:
    done, planned = record.rounds_done, record.run.get("rounds", "an unknown number of")
    if record.end.get("interrupted"):
        yield f"The run was interrupted after {done} of {planned} rounds."
    elif record.run and not record.end:
        yield f"The run has not finished: {done} of {planned} rounds are recorded."
    if record.failure:
        counts = Counter(e["what"] for e in record.failure)
        told = ", ".join(f"{count} × {what}" for what, count in counts.items())
        first = record.failure[0]
        yield f"Faults of devices were counted: {told}; the first, {first['device']}: {first['error']}."
    if record.run and not record.evaluation:
        yield "There is no evaluation yet."
    elif record.evaluation and not record.comparison:
        yield "The arms have not been compared yet."


def _summary(record: Record) -> Iterator[str]:
    """One sentence on personal, shared and ROUGE-1 against the base model."""
    clauses = []
    for arm in ("personal", "shared"):
        if c := record.comparing("nll", arm):
            by = f" by {abs(c['mean_difference']):.3f} nats per token"
            words = {"better": f"was better{by}", "worse": f"was worse{by}", "unclear": "was not better"}
            clauses.append(f"{arm_of(arm).subject} {words[outcome(c)]}")
    if c := record.comparing("rouge1", "personal") or record.comparing("rouge1", "shared"):
        by = f" by {abs(c['mean_difference']):.3f}"
        words = {"better": f"rose{by}", "worse": f"fell{by}", "unclear": "did not move"}
        clauses.append(f"ROUGE-1 of the replies {words[outcome(c)]}")
    if clauses:
        yield f"Against the base model, {_listed(clauses)}."


def _listed(clauses: list[str]) -> str:
    return clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}{',' * (len(clauses) > 2)} and {clauses[-1]}"


def _sentence(c: Event) -> str:
    """One comparison with its size, its interval and its users."""
    subject, than = _capital(arm_of(c["better"]).subject), arm_of(c["than"]).subject
    measure, unit = _METRIC_NAMES.get(c["metric"], c["metric"]), " nats per token" if c["metric"] == "nll" else ""
    size = f"{signed(c['mean_difference'])}{unit}, 95% interval {interval(c.get('ci95'))}"
    users = f"better for {c['users_better']} of {c['users']} users"
    if (found := outcome(c)) != "unclear":
        return f"{subject} was {found} than {than}: {measure} {size}; {users}."
    if c["metric"] != "nll":
        return f"{measure} did not move from {than} to {arm_of(c['better']).subject}: {size}; {users}."
    return f"{subject} was not better than {than}: {measure} {size}, which does not exclude zero; {users}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cost(record: Record) -> Iterator[str]:
    """What was spent of privacy, and whether the noise drowned the update."""
    privacy = record.run.get("privacy", {})
    if record.run.get("config", {}).get("server", {}).get("rule") == "none":
        yield "There was no server: nothing left the devices."
        return
    if privacy.get("mode") == "none":
        yield "What left the devices was not protected: privacy mode none is for simulation only."
        return
    spent = [e["epsilon"] for e in record.device_round if e.get("epsilon") is not None]
    if unknown := {e["device"] for e in record.device_round if e.get("epsilon") is None and e.get("upload_bytes")}:
        yield f"The privacy spent is not known: {len(unknown)} of the devices released without a recorded ε."
    if spent and privacy:
        budget = privacy["epsilon_budget"]
        kind = f"δ = {privacy['delta']:g}, unit {privacy['unit']}, {privacy['adjacency']}"
        if max(spent) > budget:
            yield f"The privacy budget was exceeded: a device spent ε = {max(spent):.2f} of {budget:g} ({kind})."
        else:
            yield f"No device spent more than ε = {max(spent):.2f} of its budget of {budget:g} ({kind})."
            if others := bystander(record.run, record.round):
                yield f"That is towards the server; it is {others.told}."
    last = record.round[-1] if record.round else {}
    ratio, floor = last.get("signal_to_noise"), last.get("signal_to_noise_floor")
    if is_number(ratio) and is_number(floor) and ratio < floor:
        yield f"In the last round no signal could be told from the noise: a ratio below {floor:.2f} is not measurable."
    elif is_number(ratio) and ratio < 1:
        yield f"The noise outweighed the shared update: its signal-to-noise ratio was {ratio:.2f} in the last round."


# ---- the page ----


def flattened(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as the dotted keys that the command line takes: `training.lr = 0.0001`."""
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, json.dumps(config, ensure_ascii=False)


def _plots(record: Record) -> dict[str, Any]:
    budget = record.run.get("privacy", {}).get("epsilon_budget")
    made = {
        "differences": figures.differences(record.comparison),
        "curves": figures.learning_curves(record.evaluation),
        "gains": figures.gain_distribution(record.result),
        "epsilon": figures.epsilon_spent(record.device_round, budget),
        "timing": figures.timing(record.round),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def render_report(run: Path) -> Path:
    """Reads `run/metrics.jsonl` and writes `run/report.html` at once or not at all; returns its path.

    A run that has not finished gives a report of what is there. Raises `ReportError` when there is no record.
    """
    events = read_events(run / "metrics.jsonl")
    record = collect(events)
    return html.write(
        run / "report.html", "run.html.j2", filters={"outcome": outcome, "capital": _capital}, plots=_plots(record),
        bystander=bystander(record.run, record.round), record=record, run=record.run, sentences=verdict(events),
        ratio_in_words=figures.ratio_in_words, arm_of=arm_of, metric_names=_METRIC_NAMES,
        started=datetime.fromtimestamp(record.run["time"], UTC) if "time" in record.run else None,
        totals=(totals := figures.device_totals(record.device_round)), most_listed=MOST_DEVICES_LISTED,
        spread=lambda key: figures.spread(totals, key), lengths=figures.mean_lengths(record.result),
        gains=figures.gains_by_arm(record.result), median=median,
        seconds=figures.seconds_by_phase(record.round), config=list(flattened(record.run.get("config", {}))),
    )  # fmt: skip
