"""Where a run's time went, by its events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from florilegium.simulation.runs.events import RoundEnd, RunEnd

DRIVEN = ("control", "evaluate")  # phases whose seconds are those of the clock, not of the devices' work
LAST = "last evaluation"


def wall_by_phase(rounds: Sequence[RoundEnd], end: RunEnd) -> dict[str, float]:
    """Seconds of the clock by phase, the longest first; empty where a round does not tell when it ended.

    Phases of devices, which processes work on side by side, share what their round took as they share the work.
    """
    found, before = Counter[str](), 0.0
    for event in rounds:
        if event.wall_s is None or event.seconds is None:
            return {}
        driven = {phase: event.seconds.get(phase, 0.0) for phase in DRIVEN}
        work = {phase: spent for phase, spent in event.seconds.items() if phase not in DRIVEN}
        rest = max(0.0, event.wall_s - before - sum(driven.values()))
        found.update(driven)
        found.update({phase: rest * spent / max(1e-9, sum(work.values())) for phase, spent in work.items()})
        before = event.wall_s
    found[LAST] += max(0.0, end.wall_s - before)
    return {phase: round(spent, 2) for phase, spent in found.most_common() if spent}
