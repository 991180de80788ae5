"""The log of a run, `metrics.jsonl`: one event a line, a frozen dataclass for each kind, one writer, one reader.

The reader is strict. A last line without an end, from a process that was killed, is passed over; any other line that
is no JSON, of an unknown kind, without a field that every version writes, or with a value of another type raises
`RunError` with the file and the number of the line. Fields that it does not know, of another version, are passed over
in reading and kept by `rewind`. Fields that older versions did not write have defaults.
"""

from __future__ import annotations

import json
import os
import time as clock
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from florilegium.simulation.runs.errors import RunError

Facts = dict[str, Any]  # an event as it stands in the file
Interval = tuple[float, float]  # at 95 %
OutcomeKind = Literal["answers", "late", "dropped-out", "unavailable", "too-small"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line. The order of the fields is that of the keys in the file."""

    kind: ClassVar[str]  # under the key `event`
    optional: ClassVar[Collection[str]] = ()
    time: float = 0.0  # seconds since 1970 when it was written; 0: it is not yet

    def facts(self) -> Facts:
        """Everything but kind and time, as it is written."""
        return {
            name: value
            for name, value in vars(self).items()
            if name != "time" and not (value is None and self.may_lack(name))
        }

    def may_lack(self, name: str) -> bool:
        """Whether this field is left out of the file while it is None."""
        return name in self.optional


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that a run's devices have."""

    name: str
    parameters: int
    architecture: str
    dtype: str = ""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The people behind a run's devices, without those that are resampled, and what is held out of what they said."""

    name: str
    split: str
    people: int
    held_out: int = 0
    held_out_met: int = 0  # held-out pairs that stand word for word in the same person's stream


@dataclass(frozen=True, kw_only=True)
class PrivacyFacts:
    """What a run promises, of what, and at which noise."""

    mode: str
    unit: str
    adjacency: Literal["replace-one", "add-or-remove-one"]
    trust: str
    not_covered: str = ""
    epsilon_budget: float
    delta: float
    noise_multiplier: float
    clip_norm_l2: float
    sampling_rate: float
    steps_per_round: int
    accountant: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """Settings with which a run went on that it did not begin with."""

    after_round: int
    settings: str


@dataclass(frozen=True, kw_only=True)
class RunStart(Event):
    """What a run is: the first event, brought up to date whenever the run goes on."""

    kind = "run"
    optional = ("changed",)
    name: str
    engine: str
    seed: int
    rounds: int
    devices: int
    model: ModelFacts
    data: DataFacts
    hardware: str
    versions: dict[str, str]
    privacy: PrivacyFacts
    sources: str = ""  # SHA-256 of the code
    config: dict[str, Any]  # of the version that wrote it
    changed: tuple[Change, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceRound(Event):
    """What was noted of one device in one round (`client.observation`).

    The fields from `synthetic_kept` on are None for a device that did not take what the round became.
    """

    kind = "device_round"
    optional = (
        "descendants", "refusal", "synthetic_kept", "synthetic_rejected", "synthetic_reasons", "personal_examples",
        "personal_steps", "personal_failed",
    )  # fmt: skip
    round: int
    device: str
    tokens_trained: int
    arrived: int
    accepted: int
    buffered: int
    buffer_bytes: int = 0
    truncated: int
    annotations: int  # so far
    descendants: int | None = None  # texts made from the pool's
    epsilon: float | None  # spent so far; None: there is no account
    refusal: str | None = None  # why the ledger allowed no release
    upload_bytes: int
    synthetic_kept: int | None = None
    synthetic_rejected: int | None = None
    synthetic_reasons: dict[str, int] | None = None
    personal_loss_first: float | None = None  # None too where there was nothing to learn from
    personal_loss_last: float | None = None
    personal_examples: int | None = None
    personal_steps: int | None = None
    personal_failed: str | None = None

    def may_lack(self, name: str) -> bool:
        """A loss where there was nothing to learn from is null in the file, not left out."""
        return self.personal_examples is None if name.startswith("personal_loss") else name in self.optional


@dataclass(frozen=True)
class Outcome:
    """What became of a device in a round. Who is unavailable or too small spends nothing."""

    device: str
    device_class: str
    outcome: OutcomeKind
    arrives_s: float | None = None  # after the round's start; None: never
    busy_s: float = 0.0
    energy_joules: float = 0.0
    down_bytes: int = 0
    up_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class WorldRound(Event):
    """A round of a simulated world: when it was, and what became of the devices that were asked."""

    kind = "world"
    round: int
    starts_s: float
    duration_s: float
    fates: tuple[Outcome, ...]


@dataclass(frozen=True, kw_only=True)
class RoundEnd(Event):
    """What the server knows of a round that is over. A server of real devices leaves out what it cannot know."""

    kind = "round"
    optional = ("devices", "seconds", "wall_s", "shared_norm_l2", "download_bytes")
    round: int
    devices: int | None = None  # that were asked
    releases: int
    silent: int = 0
    refused: dict[str, int]  # error code → devices
    failed_adoptions: int = 0
    averaging_error: float | None = None
    held_bytes: int = 0
    seconds: dict[str, float] | None = None  # by phase, summed over devices
    wall_s: float | None = None  # of the run, until it was over
    signal_to_noise: float | None  # None: there was no noise
    signal_to_noise_floor: float | None = None
    change_norm_l2: float
    shared_norm_l2: float | None = None
    download_bytes: int | None = None  # to a device, before its training and after


@dataclass(frozen=True, kw_only=True)
class DeviceFailure(Event):
    """A fault of one device that was counted (`engine.on_device_error`)."""

    kind = "failure"
    round: int
    device: str
    what: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Evaluation(Event):
    """One metric of one arm after a round, over the evaluated devices' held-out replies."""

    kind = "evaluation"
    arm: str
    metric: str
    mean_per_user: float
    mean_per_query: float
    ci95: Interval  # of the mean over users
    round: int
    final: bool
    users: int
    queries: int


@dataclass(frozen=True, kw_only=True)
class DeviceResult(Event):
    """How one device fared with one arm after the last round."""

    kind = "result"
    optional = ("rouge1", "mean_length_tokens")
    device: str
    arm: str
    nll: float  # nats per token
    queries: int
    rouge1: float | None = None
    mean_length_tokens: float | None = None  # of its replies


@dataclass(frozen=True, kw_only=True)
class PairedDifference(Event):
    """The arm `better` minus the arm `than`, paired by user."""

    metric: str
    better: str
    than: str
    mean_difference: float
    ci95: Interval
    users: int
    users_better: int


@dataclass(frozen=True, kw_only=True)
class ArmComparison(PairedDifference):
    """Two arms on the evaluated devices, after the last round."""

    kind = "comparison"


@dataclass(frozen=True, kw_only=True)
class ShownReply(Event):
    """A held-out prompt with three replies, for reading: the user's, the base model's, the personal adapter's."""

    kind = "replies"
    device: str
    prompt: str
    recorded: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class NewcomersEvaluation(Event):
    """One arm on people who never took part."""

    kind = "newcomers"
    arm: str
    metric: str
    users: int
    mean_per_user: float
    mean_per_query: float
    ci95: Interval


@dataclass(frozen=True, kw_only=True)
class NewcomersComparison(PairedDifference):
    """Two arms on people who never took part."""

    kind = "newcomers_comparison"


@dataclass(frozen=True, kw_only=True)
class PersonMeasure(Event):
    """One measure of whether a model has become its person's, of one arm, after the last round.

    Of a measure that cannot tell these people apart by their real replies there are floor and ceiling alone.
    """

    kind = "person"
    metric: str
    arm: str
    users: int
    mean_per_user: float | None  # None: it is not reported
    ci95: Interval | None
    floor: float | None  # what other people's real replies come to in the person's place
    ceiling: float | None  # what the person's own do
    replies: int  # of each person
    needed: int  # real replies of each person with which it tells these people apart; 0: not looked for or not found
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PersonComparison(PairedDifference):
    """Two arms by such a measure; all of a run are one family."""

    kind = "person_comparison"
    p_holm: float


@dataclass(frozen=True, kw_only=True)
class PersonResult(Event):
    """What these measures are for one device and arm."""

    kind = "person_result"
    device: str
    arm: str
    values: dict[str, float]  # by metric


@dataclass(frozen=True, kw_only=True)
class MeanGain:
    """What devices gained on average; None where there is no device."""

    mean: float | None
    ci95: Interval | None


@dataclass(frozen=True, kw_only=True)
class ClassCosts:
    """One class of devices: what it gave and spent over all rounds, and what those that are evaluated gained."""

    devices: int  # that are evaluated
    asked: int
    answered: int
    outcomes: dict[str, int]
    share_of_answers: float | None  # of all answers
    seconds: float  # at work
    bytes: int
    joules: float
    utility: MeanGain


@dataclass(frozen=True, kw_only=True)
class DataQuartile:
    """A quarter of the evaluated devices, by how much data they have."""

    least_data: float
    most_data: float
    devices: int
    utility: MeanGain


@dataclass(frozen=True, kw_only=True)
class FairnessFigures:
    """To whom a world was fair."""

    utility_by_data_quartile: tuple[DataQuartile, ...]
    jain_participation: float | None
    worst_decile_utility: float | None


@dataclass(frozen=True, kw_only=True)
class WorldFairness(Event):
    """What a simulated world cost, by class of devices, and to whom it was fair."""

    kind = "fairness"
    wall_s: float
    rounds: int
    classes: dict[str, ClassCosts]
    fairness: FairnessFigures


@dataclass(frozen=True, kw_only=True)
class RunEnd(Event):
    """The end of a process that ran rounds; `interrupted`: not all of them."""

    kind = "end"
    wall_s: float  # of all processes that worked on the run
    peak_rss_bytes: int
    tokens_trained: int
    devices_bytes: int = 0
    interrupted: bool


KINDS: Mapping[str, type[Event]] = {
    each.kind: each
    for each in (
        RunStart, DeviceRound, WorldRound, RoundEnd, DeviceFailure, Evaluation, DeviceResult, ArmComparison,
        ShownReply, PersonMeasure, PersonComparison, PersonResult, NewcomersEvaluation, NewcomersComparison,
        WorldFairness, RunEnd,
    )
}  # fmt: skip


def append(path: Path, events: Iterable[Event]) -> None:
    """Writes events to the end of a log, with the time."""
    now = round(clock.time(), 3)
    _end_last_line(path)
    with path.open("ab") as stream:
        stream.writelines(_line({"event": e.kind, "time": now} | e.facts()) for e in events)


def read(path: Path) -> Iterator[Event]:
    """All events of a log; raises `RunError` for a line that is none."""
    return (event for event, _ in _read_lines(path))


def rewind(path: Path, change: Callable[[Event, Facts], Facts | None]) -> None:
    """Writes a log anew: of each event what `change` makes of it and of its line, and none where that is None.

    Raises `RunError` for a line that it does not understand, and leaves the log as it was.
    """
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as stream:
        stream.writelines(_line(kept) for event, facts in _read_lines(path) if (kept := change(event, facts)))
    fresh.replace(path)


class Tail:
    """A log as far as it has been read; one that was rewound since is read anew from its first event."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, self._at, self._number = -1, 0, 0

    def more(self) -> Iterator[Event]:
        """What has been written since; of a line that is being written nothing."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            found = os.fstat(stream.fileno())
            if found.st_ino != self._file or found.st_size < self._at:
                self._file, self._at, self._number = found.st_ino, 0, 0
            stream.seek(self._at)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._at, self._number = self._at + len(line), self._number + 1
                yield _parsed(_json(line, self.path, self._number), self.path, self._number)


def follow(path: Path, every_s: float = 0.5, over: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """The events of a run that is going on, as they come; ends with the run, or once `over` says that it is.

    A log that is not there yet is waited for. One that is rewound meanwhile is told anew from its first event.
    """
    tail = Tail(path)
    while True:
        last_look = over()
        for event in tail.more():
            yield event
            if isinstance(event, RunEnd):
                return
        if last_look:
            return
        clock.sleep(every_s)


def _read_lines(path: Path) -> Iterator[tuple[Event, Facts]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                facts = _json(line, path, number)
            except RunError:
                if line.endswith(b"\n"):
                    raise
                return  # torn by a crash: there is no other line after one without an end
            yield _parsed(facts, path, number), facts


def _json(line: bytes, path: Path, number: int) -> Facts:
    try:
        facts = json.loads(line)
    except ValueError as error:
        raise RunError(f"{path}, line {number} is not JSON ({error}); remove that line to go on") from None
    return dict(facts) if isinstance(facts, dict) else {}


def _parsed(facts: Facts, path: Path, number: int) -> Event:
    kind = KINDS.get(facts.get("event", ""))
    if kind is None:
        raise RunError(
            f"{path}, line {number}: {facts.get('event')!r} is no kind of event of this version, which knows "
            f"{', '.join(KINDS)}; read it with the version that wrote it"
        )
    try:
        return _adapter(kind.kind).validate_python(facts)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"{path}, line {number}: {where!r} of the event {kind.kind!r}: {first['msg']}") from None


@cache
def _adapter(kind: str) -> TypeAdapter[Event]:
    return TypeAdapter(KINDS[kind])


def _line(facts: Facts) -> bytes:
    return json.dumps(facts, allow_nan=True, default=asdict).encode() + b"\n"


def _end_last_line(path: Path) -> None:
    """So that nothing is written to a line that a killed process has begun: it goes, unless it lacks its end alone."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read() == b"\n":
            return
        stream.seek(0)
        whole, _, torn = stream.read().rpartition(b"\n")
        try:
            json.loads(torn)
            stream.write(b"\n")
        except ValueError:
            stream.truncate(len(whole) + 1 if whole else 0)
