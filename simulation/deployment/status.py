"""How a server for real devices does, for its operator: rounds, devices, refusals; as JSON and as Prometheus' metrics.

Nothing that a device sent is in it but counts. Names are those that the operator gave, and in metrics there are none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from florilegium.client.agent.http_server import HttpServer
from florilegium.client.agent.terms import Terms
from florilegium.server.strategy import TOO_FEW
from florilegium.simulation.deployment.activity import Activity
from florilegium.simulation.deployment.link import Link
from florilegium.simulation.deployment.register import fingerprint
from florilegium.simulation.runs.events import RoundEnd
from florilegium.simulation.runs.folder import RunFolder

SHOWN = 50  # rounds on the page, the newest


class Counted(Protocol):
    """What came of a round."""

    @property
    def releases(self) -> int: ...

    @property
    def refused(self) -> dict[str, int]: ...


def came_to(facts: Counted, least: int) -> str:
    """A round in a line, for the operator."""
    codes = sorted(code for code in facts.refused if code != TOO_FEW)  # who is too few was no fault of theirs
    refused = "".join(f", {facts.refused[code]} {code}" for code in codes)
    if facts.releases < least:
        return f"not aggregated: {facts.releases} releases of the {least} that it needs{refused}"
    return f"{facts.releases} releases{refused}"


@dataclass
class Status:
    """Of a server that runs: its folder, terms and link, what its door has seen and holds."""

    folder: Path
    terms: Terms
    link: Link
    activity: Activity
    door: HttpServer
    _read: tuple[int, list[RoundEnd]] = field(default=(-1, []), init=False)  # bytes of the log, what they say

    def rounds(self) -> list[RoundEnd]:
        """Those that are over, oldest first."""
        run = RunFolder(self.folder)
        size = run.metrics.stat().st_size if run.metrics.exists() else 0
        if size != self._read[0]:
            self._read = size, list(run.events_of(RoundEnd))
        return self._read[1]

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        rounds, online, names = self.rounds(), self.link.online(), dict(self.link.keys)
        least = self.terms.fewest
        return {
            "federation": self.terms.name,
            "model": self.terms.model,
            "since": self.activity.began,
            "now": time.time(),
            "agreed": self.terms.rounds,
            "done": rounds[-1].round if rounds else 0,
            "least": least,
            "rounds": [
                {"round": r.round, "time": r.time, "releases": r.releases, "silent": r.silent, "refused": r.refused,
                 "aggregated": r.releases >= least, "told": came_to(r, least)} for r in rounds[-SHOWN:]
            ],
            "devices": [
                {"name": name, "key": fingerprint(key), "connected": name in online,
                 "heard": self.activity.heard.get(name)} for key, name in sorted(names.items(), key=lambda n: n[1])
            ],
            "turned_away": dict(self.activity.turned_away),
            "connections": self.door.inside.total(),
            "unauthenticated": self.door.unauthenticated.total(),
        }  # fmt: skip

    def metrics(self) -> bytes:
        """In Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(_Collector(self))
        return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, status: Status) -> None:
        self.status = status

    def collect(self) -> Iterator[Metric]:
        status, rounds, online = self.status, self.status.rounds(), self.status.link.online()
        door, activity, last = status.door, status.activity, rounds[-1:]
        gauges = {
            "rounds_agreed": ("Rounds of the terms", status.terms.rounds),
            "round_releases_least": ("Releases below which a round is not aggregated", status.terms.fewest),
            "devices_admitted": ("Devices that may connect", len(status.link.nodes)),
            "devices_connected": ("Devices that are connected", len(online)),
            "door_connections": ("Connections at the devices' port", door.inside.total()),
            "door_unauthenticated_connections": ("Those that have shown no key", door.unauthenticated.total()),
            "start_time_seconds": ("When the server started, since 1970", activity.began),
            "last_round_time_seconds": ("When the last round was over, since 1970", sum(r.time for r in last)),
            "last_round_releases": ("Releases of the last round", sum(r.releases for r in last)),
        }
        for name, (told, value) in gauges.items():
            yield GaugeMetricFamily(f"florilegium_{name}", told, value)
        counters = {
            "rounds": ("Rounds that are over", len(rounds)),
            "rounds_not_aggregated": (
                "Of these, with too few",
                sum(r.releases < status.terms.fewest for r in rounds),
            ),
            "releases": ("Releases that were taken", sum(r.releases for r in rounds)),
            "silent_devices": ("Devices that were asked and said nothing", sum(r.silent for r in rounds)),
        }
        for name, (told, value) in counters.items():
            yield CounterMetricFamily(f"florilegium_{name}", told, value)
        refused = sum((Counter(r.refused) for r in rounds), Counter[str]())
        yield _by("refused_releases", "Releases that were refused", "code", refused)
        yield _by("turned_away_requests", "Requests at the devices' port", "answer", activity.turned_away)


def _by(name: str, told: str, label: str, counted: Counter[str]) -> Metric:
    found = CounterMetricFamily(f"florilegium_{name}", told, labels=[label])
    for value, number in sorted(counted.items()):
        found.add_metric([value], number)
    return found
