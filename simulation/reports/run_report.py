"""Writes the report of a run: one HTML file that loads nothing from elsewhere, made from `metrics.jsonl` alone.

The verdict is plain sentences: an arm is called better or worse only when the 95% interval of its paired
difference leaves zero out. Does not compute any metric; what was not recorded is shown as missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from florilegium.simulation.reports import figures, html
from florilegium.simulation.reports.figures import is_number
from florilegium.simulation.reports.html import interval, signed
from florilegium.simulation.runs.arms import ARMS, COMPARISONS, PERSON, arm_of
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import (
    KINDS,
    ArmComparison,
    DeviceFailure,
    DeviceResult,
    DeviceRound,
    Evaluation,
    Event,
    NewcomersComparison,
    NewcomersEvaluation,
    PairedDifference,
    PersonComparison,
    PersonMeasure,
    RoundEnd,
    RunEnd,
    RunStart,
    ShownReply,
    WorldFairness,
    read,
)
from florilegium.simulation.runs.mean_observer import bystander

MOST_DEVICES_LISTED = 200
_IDENTITY = ("round", "device", "arm", "metric", "better", "than", "prompt", "what")
_METRIC_NAMES = {"nll": "NLL", "rouge1": "ROUGE-1"}


@dataclass(frozen=True, slots=True)
class Record:
    """The events of a run by kind, rounds in order. What was repeated after a crash is there once, as last recorded."""

    run: RunStart | None
    end: RunEnd | None
    device_round: tuple[DeviceRound, ...]
    round: tuple[RoundEnd, ...]
    evaluation: tuple[Evaluation, ...]
    result: tuple[DeviceResult, ...]
    comparison: tuple[ArmComparison, ...]
    replies: tuple[ShownReply, ...]
    person: tuple[PersonMeasure, ...]
    person_comparison: tuple[PersonComparison, ...]
    newcomers: tuple[NewcomersEvaluation, ...]
    newcomers_comparison: tuple[NewcomersComparison, ...]
    fairness: tuple[WorldFairness, ...]
    failure: tuple[DeviceFailure, ...]

    @property
    def rounds_done(self) -> int:
        return self.round[-1].round if self.round else 0

    def comparing(self, metric: str, better: str, than: str = "base") -> ArmComparison | None:
        """The paired comparison of two arms, if it was recorded and is a number."""
        wanted = (metric, better, than)
        found = (c for c in self.comparison if (c.metric, c.better, c.than) == wanted)
        return next((c for c in found if is_number(c.mean_difference)), None)

    def of_person(self) -> dict[str, dict[str, PersonMeasure]]:
        """By measure and arm."""
        found: dict[str, dict[str, PersonMeasure]] = {}
        for m in self.person:
            found.setdefault(m.metric, {})[m.arm] = m
        return found

    def comparing_person(self, metric: str, than: str) -> PersonComparison | None:
        """The personal arm against another one by such a measure."""
        found = (c for c in self.person_comparison if (c.metric, c.better, c.than) == (metric, "personal", than))
        return next((c for c in found if is_number(c.mean_difference)), None)

    def latest(self, metric: str) -> dict[str, Evaluation]:
        """The last evaluation of each arm, in the order of `ARMS`."""
        found = {e.arm: e for e in self.evaluation if e.metric == metric}
        return {arm: found[arm] for arm in [*ARMS, *sorted(found.keys() - ARMS.keys())] if arm in found}


def collect(events: Iterable[Event]) -> Record:
    """Sorts events by kind. Of events with the same identity the last one holds; an end before a restart does not."""
    last: dict[tuple[str, ...], Event] = {}
    run: RunStart | None = None
    end: RunEnd | None = None
    for event in events:
        last[event.kind, *(str(getattr(event, key, None)) for key in _IDENTITY)] = event
        if isinstance(event, RunStart):
            run, end = event, None
        elif isinstance(event, RunEnd):
            end = event
    ordered = sorted(last.values(), key=lambda e: getattr(e, "round", 0))
    kinds = {f.name: KINDS[f.name] for f in fields(Record) if f.name not in ("run", "end")}
    by_kind = {name: tuple(e for e in ordered if isinstance(e, kind)) for name, kind in kinds.items()}
    return Record(run, end, **by_kind)  # type: ignore[arg-type]  # each field has the name of its kind


# ---- the verdict ----


def outcome(comparison: PairedDifference) -> str:
    """`better`, `worse`, or `unclear` when the 95% interval contains zero or is not a number."""
    low, high = comparison.ci95
    if high < 0:
        return "better" if comparison.metric == "nll" else "worse"
    if low > 0:
        return "worse" if comparison.metric == "nll" else "better"
    return "unclear"


def verdict(record: Record) -> list[str]:
    """Plain sentences on what the run showed; the first one stands for all of them.

    An arm whose interval contains zero is called not better, never nearly better.
    """
    asked = sorted((place, which) for which, place in COMPARISONS.items() if place is not None)
    found = [c for _, which in asked if (c := record.comparing(*which))]
    sentences = [*_progress(record), *_summary(record), *(_sentence(c) for c in found), *_cost(record)]
    return sentences or ["The run has recorded nothing yet."]


def _progress(record: Record) -> Iterator[str]:
    done, planned = record.rounds_done, record.run.rounds if record.run else "an unknown number of"
    if record.end and record.end.interrupted:
        yield f"The run was interrupted after {done} of {planned} rounds."
    elif record.run and not record.end:
        yield f"The run has not finished: {done} of {planned} rounds are recorded."
    if record.failure:
        counts = Counter(e.what for e in record.failure)
        told = ", ".join(f"{count} × {what}" for what, count in counts.items())
        first = record.failure[0]
        yield f"Faults of devices were counted: {told}; the first, {first.device}: {first.error}."
    if record.run and not record.evaluation:
        yield "There is no evaluation yet."
    elif record.evaluation and not record.comparison:
        yield "The arms have not been compared yet."


def _summary(record: Record) -> Iterator[str]:
    """One sentence on personal, shared and ROUGE-1 against the base model."""
    clauses = []
    for arm in ("personal", "shared"):
        if c := record.comparing("nll", arm):
            by = f" by {abs(c.mean_difference):.3f} nats per token"
            words = {"better": f"was better{by}", "worse": f"was worse{by}", "unclear": "was not better"}
            clauses.append(f"{arm_of(arm).subject} {words[outcome(c)]}")
    if c := record.comparing("rouge1", "personal") or record.comparing("rouge1", "shared"):
        by = f" by {abs(c.mean_difference):.3f}"
        words = {"better": f"rose{by}", "worse": f"fell{by}", "unclear": "did not move"}
        clauses.append(f"ROUGE-1 of the replies {words[outcome(c)]}")
    if clauses:
        yield f"Against the base model, {_listed(clauses)}."


def _listed(clauses: list[str]) -> str:
    return clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}{',' * (len(clauses) > 2)} and {clauses[-1]}"


def _sentence(c: ArmComparison) -> str:
    """One comparison with its size, its interval and its users."""
    subject, than = _capital(arm_of(c.better).subject), arm_of(c.than).subject
    measure, unit = _METRIC_NAMES.get(c.metric, c.metric), " nats per token" if c.metric == "nll" else ""
    size = f"{signed(c.mean_difference)}{unit}, 95% interval {interval(c.ci95)}"
    users = f"better for {c.users_better} of {c.users} users"
    if (found := outcome(c)) != "unclear":
        return f"{subject} was {found} than {than}: {measure} {size}; {users}."
    if c.metric != "nll":
        return f"{measure} did not move from {than} to {arm_of(c.better).subject}: {size}; {users}."
    return f"{subject} was not better than {than}: {measure} {size}, which does not exclude zero; {users}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cost(record: Record) -> Iterator[str]:
    """What was spent of privacy, and whether the noise drowned the update."""
    privacy = record.run.privacy if record.run else None
    if record.run and record.run.config.get("server", {}).get("rule") == "none":
        yield "There was no server: nothing left the devices."
        return
    if privacy and privacy.mode == "none":
        yield "What left the devices was not protected: privacy mode none is for simulation only."
        return
    spent = [e.epsilon for e in record.device_round if e.epsilon is not None]
    if unknown := {e.device for e in record.device_round if e.epsilon is None and e.upload_bytes}:
        yield f"The privacy spent is not known: {len(unknown)} of the devices released without a recorded ε."
    if spent and record.run and privacy:
        budget = privacy.epsilon_budget
        kind = f"δ = {privacy.delta:g}, unit {privacy.unit}, {privacy.adjacency}"
        if max(spent) > budget:
            yield f"The privacy budget was exceeded: a device spent ε = {max(spent):.2f} of {budget:g} ({kind})."
        else:
            yield f"No device spent more than ε = {max(spent):.2f} of its budget of {budget:g} ({kind})."
            if others := bystander(record.run, record.round):
                yield f"That is towards the server; it is {others.told}."
    last = record.round[-1] if record.round else None
    ratio, floor = (last.signal_to_noise, last.signal_to_noise_floor) if last else (None, None)
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
    budget = record.run.privacy.epsilon_budget if record.run else None
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

    A run that has not finished gives a report of what is there. Raises `RunError` when there is no record, or one
    that is damaged.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        raise RunError(f"{path} is missing; give the folder of a run, the one that holds metrics.jsonl")
    record = collect(read(path))
    start = record.run
    seen = bystander(start, record.round) if start else None
    return html.write(
        run / "report.html", "run.html.j2", filters={"outcome": outcome, "capital": _capital}, plots=_plots(record),
        bystander=seen, record=record, run=start, sentences=verdict(record),
        ratio_in_words=figures.ratio_in_words, arm_of=arm_of, metric_names=_METRIC_NAMES, person_names=PERSON,
        arms_of_person=[a for a in ARMS if any(m.arm == a for m in record.person)],
        started=datetime.fromtimestamp(start.time, UTC) if start and start.time else None,
        totals=(totals := figures.device_totals(record.device_round)), most_listed=MOST_DEVICES_LISTED,
        spread=lambda key: figures.spread(totals, key), lengths=figures.mean_lengths(record.result),
        gains=figures.gains_by_arm(record.result), median=median,
        seconds=figures.seconds_by_phase(record.round), config=list(flattened(start.config)) if start else [],
    )  # fmt: skip
