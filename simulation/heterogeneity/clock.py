"""A simulated world's time: which of the asked devices answer in a round, and when it ends (`availability`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from florilegium.simulation.heterogeneity.availability import Arrival, Round, Work, arrivals, simulate_round
from florilegium.simulation.heterogeneity.classes import DevicePopulation, class_of
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import WorldRound

WAITED_FOR = ("answers", "late", "dropped-out")  # they have computed, whatever came of it


@dataclass
class Clock:
    """The rounds so far. A round is played once; asked for again it is the same."""

    world: DevicePopulation
    work: Callable[[str], Work]
    wanted: int  # answers that end a round
    needed_bytes: int
    rounds: dict[int, Round] = field(default_factory=dict)

    def round(self, number: int, names: Sequence[str]) -> Round:
        """What becomes of the devices that are asked in round `number`, which begins after the one before."""
        if number not in self.rounds:
            asked = {name: self.work(name) for name in names}
            self.rounds[number] = simulate_round(
                self.world, number, self._starts_s(number), asked, self.wanted, self.needed_bytes
            )
        return self.rounds[number]

    def _starts_s(self, number: int) -> float:
        last = self.rounds.get(number - 1)
        return last.starts_s + last.duration_s + self.world.settings.idle_s if last else 0.0

    def recall(self, event: WorldRound) -> None:
        """Takes a round back from the event that was recorded of it."""
        self.rounds[event.round] = Round(event.round, event.starts_s, event.duration_s, event.fates)


@dataclass
class BufferedClock(Clock):
    """Versions instead of rounds: each is made by the next `wanted` answers (FedBuff)."""

    devices: Sequence[str] = ()
    concurrency: int = 1
    began: dict[int, dict[str, int]] = field(default_factory=dict)  # version → device → what it began from
    coming: Iterator[Arrival] | None = None

    def makers(self, number: int) -> Mapping[str, int]:
        """The devices that worked for version `number`, with the version that each began from.

        Those that dropped out are among them: they have paid, and trained, in vain.
        """
        if self.coming is None:
            self._check()
            self.coming = arrivals(
                self.world, self.devices, self.work, concurrency=self.concurrency,
                buffer_size=self.wanted, needed_bytes=self.needed_bytes,
            )  # fmt: skip
        while number not in self.began:
            came: list[Arrival] = []
            while sum(a.fate.outcome == "answers" for a in came) < self.wanted:
                came.append(next(self.coming))
            self._make(len(self.began) + 1, came)
        return self.began[number]

    def _check(self) -> None:
        """Raises `RunError` where no version would ever come."""
        classes = {class_of(name, self.world.classes, self.world.seed) for name in self.devices}
        if not any(c.memory_bytes >= self.needed_bytes and max(c.available) > 0 for c in classes):
            raise RunError(
                f"no device can ever answer: {', '.join(sorted(c.name for c in classes))} are never there or have less "
                f"than the {self.needed_bytes:,} bytes that training needs; change world.classes"
            )

    def _make(self, number: int, came: Sequence[Arrival]) -> None:
        """Of a device that worked twice for one version, the first answer counts, else what it dropped out of."""
        before = self.rounds.get(number - 1)
        starts_s = before.starts_s + before.duration_s if before else 0.0
        first = {a.fate.device: a for a in sorted(reversed(came), key=lambda a: a.fate.outcome == "answers")}
        self.began[number] = {device: a.version for device, a in first.items()}
        fates = tuple(a.fate for a in came)
        self.rounds[number] = Round(number, starts_s, came[-1].at_s - starts_s, fates)

    def round(self, number: int, names: Sequence[str]) -> Round:
        self.makers(number)
        return self.rounds[number]


def as_event(played: Round) -> WorldRound:
    """A round as it is recorded; the inverse of `Clock.recall`."""
    return WorldRound(round=played.number, starts_s=played.starts_s, duration_s=played.duration_s, fates=played.fates)
