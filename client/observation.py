"""What is noted of a device in a round, and how long its phases took. It stays on the device, or in the simulation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What was seen of one device in a round, or in some of its phases. None: they did not run, or saw nothing."""

    arrived: int | None = None  # dialogues
    accepted: int | None = None  # of them into the buffer
    buffered: int | None = None
    buffer_bytes: int | None = None
    truncated: int | None = None  # texts, to the model's limits
    annotations: int | None = None  # so far
    descendants: int | None = None  # texts made from the pool's
    epsilon: float | None = None  # spent so far; there may be no account
    refusal: str | None = None  # why the ledger allowed no release
    upload_bytes: int | None = None
    shared_tokens: int | None = None  # trained, where that is not planned
    synthetic_kept: int | None = None
    synthetic_rejected: int | None = None
    synthetic_reasons: Mapping[str, int] | None = None
    personal_loss_first: float | None = None
    personal_loss_last: float | None = None
    personal_examples: int | None = None
    personal_steps: int | None = None
    personal_tokens: int | None = None
    personal_failed: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase, a cohort's shared out evenly

    def joined(self, later: Observation) -> Observation:
        """With what later phases saw, which stands where both have seen something, and the seconds of both."""
        seconds = {**self.seconds, **later.seconds}
        return Observation(**{**self.seen(), **later.seen(), "seconds": seconds})  # type: ignore[arg-type]

    def seen(self) -> dict[str, object]:
        """What is not None, by name: what a store keeps as JSON."""
        return {name: value for name in NAMES if (value := getattr(self, name)) is not None}

    @classmethod
    def of(cls, stored: Mapping[str, object]) -> Observation:
        """The inverse of `seen`; what a later version has noted besides is left out."""
        return cls(**{name: value for name, value in stored.items() if name in NAMES})  # type: ignore[arg-type]


NAMES = tuple(x.name for x in fields(Observation))


class PhaseRecorder:
    """What the phases of a round see of each device of a cohort, with the seconds of each phase."""

    def __init__(self, devices: int, number: int, listener: Callable[[str], None] | None) -> None:
        self.observations = [Observation()] * devices
        self.number, self.listener = number, listener

    @contextmanager
    def phase(self, name: str) -> Iterator[list[Observation]]:
        """Yields a list to fill with one observation a device; an error within it is noted to be of this phase."""
        if self.listener:
            self.listener(name)
        began, seen = time.perf_counter(), list[Observation]()
        try:
            yield seen
        except Exception as error:
            error.add_note(f"in the phase {name} of round {self.number}")
            raise
        seconds = (time.perf_counter() - began) / len(self.observations)
        timed = [replace(o, seconds={name: seconds}) for o in seen]
        self.observations = [o.joined(more) for o, more in zip(self.observations, timed, strict=True)]
