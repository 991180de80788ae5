"""Where a run's time went, by its events."""

from __future__ import annotations

from collections.abc import Sequence

from florilegium.simulation.runs.events import RoundEnd, RunEnd

START, DRIVEN = "start", ("start", "control", "evaluate")  # seconds of the clock, not of the devices' work
REST, LAST = "the rest", "after the last round"


def wall_by_phase(rounds: Sequence[RoundEnd], end: RunEnd) -> dict[str, float]:
    """Seconds of the clock by phase, the longest first; empty where a round does not tell when it ended.

    Phases of devices, which processes work on side by side, share what their round took as they share the work.
    """
    spans: list[tuple[str, float]] = []
    before = 0.0
    for event in rounds:
        if event.wall_s is None or event.seconds is None:
            return {}
        driven = [(phase, event.seconds.get(phase, 0.0)) for phase in DRIVEN]
        work = {phase: spent for phase, spent in event.seconds.items() if phase not in DRIVEN}
        rest, total = max(0.0, event.wall_s - before - sum(s for _, s in driven)), sum(work.values())
        spans += driven
        spans += [(phase, rest * spent / total) for phase, spent in work.items()] if total else [(REST, rest)]
        before = event.wall_s
    spans.append((LAST, max(0.0, end.wall_s - before)))
    found: dict[str, float] = {}
    for phase, spent in spans:
        found[phase] = found.get(phase, 0.0) + spent
    longest = sorted(found.items(), key=lambda item: -item[1])
    return {phase: round(spent, 2) for phase, spent in longest if spent}
