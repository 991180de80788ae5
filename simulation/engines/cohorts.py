"""Who is computed with whom: cohorts of devices, packed so that all processes finish together.

A device keeps to the process that its shard belongs to; some move from the process with the most predicted work to
the one with the least. Not covered: how fast a process is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from florilegium.simulation.engines.workers import Cohort
from florilegium.simulation.runs.device_store import Shards


def pack(names: Sequence[str], tokens: Mapping[str, float], shards: Shards, homes: int, size: int) -> list[Cohort]:
    """Cohorts of at most `size` devices for so many homes, at each home in the order of the names, moved ones last."""
    at_home: list[list[str]] = [[] for _ in range(homes)]
    for name in names:
        at_home[shards.of(name) % homes].append(name)
    _level(at_home, tokens)
    return [
        Cohort(tuple(some[i : i + size]), home)
        for home, some in enumerate(at_home)
        for i in range(0, len(some), size)
    ]  # fmt: skip


def _level(at_home: list[list[str]], tokens: Mapping[str, float]) -> None:
    """Evens out the homes: from the one with most to the one with least, the device that is nearest to half the gap.

    It ends when no device is smaller than the gap; then the gap is at most the largest device. A move makes the sum
    of the loads' squares smaller, so there is an end.
    """
    loads = [sum(tokens[n] for n in some) for some in at_home]
    while True:
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[heavy] - loads[light]
        fits = [name for name in at_home[heavy] if 0 < tokens[name] < gap]
        if not fits:
            return
        name = min(fits, key=lambda n: (abs(tokens[n] - gap / 2), n))
        at_home[heavy].remove(name)
        at_home[light].append(name)
        loads[heavy] -= tokens[name]
        loads[light] += tokens[name]
