"""What becomes of devices that are asked: who is there, who answers, when, and what it costs. Pure functions.

Chances by hour, drop-outs, over-sampling and the deadline follow Bonawitz et al., "Towards federated learning at
scale" (MLSys 2019, arXiv 1902.01046), sections 2 and 9; `arrivals` follows FedBuff (Nguyen et al., AISTATS 2022, arXiv
2106.06639). Time is virtual, nothing waits. Not covered: sessions (being there in one round says nothing of the next),
batteries and heat, links that devices share, a server's own time, generated tokens (they count as if they were read,
though written one at a time they take longer).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from florilegium.simulation.config import WorldConfig
from florilegium.simulation.heterogeneity.classes import DeviceClass, DevicePopulation, class_of, local_hour, uniform
from florilegium.simulation.runs.events import Outcome, OutcomeKind


@dataclass(frozen=True)
class Work:
    """What a device is asked to do: fetch, compute, send its answer, compute on (its personal adapter)."""

    tokens_before: float  # in trained tokens, see `trained_tokens`
    tokens_after: float
    down_bytes: int
    up_bytes: int


@dataclass(frozen=True)
class Round:
    """The fates of a round's devices by name. The next begins at `starts_s + duration_s + idle_s`."""

    number: int
    starts_s: float
    duration_s: float
    fates: tuple[Outcome, ...]

    @property
    def outcomes(self) -> dict[str, OutcomeKind]:
        """By device; of one that did more than one thing, that it answered."""
        by_device = {f.device: f.outcome for f in self.fates}
        return by_device | {f.device: f.outcome for f in self.fates if f.outcome == "answers"}

    @property
    def answers(self) -> tuple[str, ...]:
        """Devices whose answers count, as they arrived; at the same time, by name."""
        return tuple(f.device for f in _by_arrival(f for f in self.fates if f.outcome == "answers"))


@dataclass(frozen=True)
class Arrival:
    """The end of a device's work in asynchronous aggregation: its answer, or that it dropped out."""

    at_s: float  # on the run's clock
    fate: Outcome
    version: int  # of the shared adapter from which the device started
    staleness: int  # versions made since


def trained_tokens(trained: float, read: float) -> float:
    """Reading costs a third of training: 2 N of 6 N operations a token (Kaplan et al. 2020, arXiv 2001.08361, 2.1).

    With frozen weights, which need no gradients of their own, it would be nearer to half.
    """
    return trained + read / 3


def simulate_round(
    world: DevicePopulation, number: int, t_s: float, asked: Mapping[str, Work], wanted: int, needed_bytes: int = 0
) -> Round:
    """The fates of the devices that are asked at `t_s`, and how long the server waits for `wanted` answers.

    An answer counts if it arrives by the deadline and among the first `wanted`. Who is late has done all of its work.
    """
    alone = [outcome_alone(world, number, t_s, d, asked[d], needed_bytes) for d in sorted(asked)]
    arriving = _by_arrival(f for f in alone if f.outcome == "answers")
    counted = {f.device for f in arriving[:wanted] if _in_time(world.settings, f)}
    fates = tuple(
        replace(f, outcome="late") if f.outcome == "answers" and f.device not in counted else f for f in alone
    )
    return Round(number, t_s, _duration_s(world.settings, fates, wanted), fates)


def outcome_alone(
    world: DevicePopulation, number: int, t_s: float, device: str, work: Work, needed_bytes: int = 0
) -> Outcome:
    """What becomes of a device that begins at `t_s`, before the server's patience: it answers unless it fails."""
    kind = class_of(device, world.classes, world.seed)
    if kind.memory_bytes < needed_bytes:
        return Outcome(device, kind.name, "too-small")
    if uniform(world.seed, "there", device, number) >= kind.available[int(local_hour(world, device, t_s))]:
        return Outcome(device, kind.name, "unavailable")
    arrives_s = answer_s(kind, work)
    if uniform(world.seed, "drop-out", device, number) < world.settings.drop_out:
        stops_s = arrives_s * uniform(world.seed, "stops", device, number)
        return _spent(Outcome(device, kind.name, "dropped-out", None, stops_s), kind, _done(kind, work, stops_s))
    busy_s = arrives_s + work.tokens_after / kind.train_tokens_per_s
    return _spent(Outcome(device, kind.name, "answers", arrives_s, busy_s), kind, work)


def answer_s(kind: DeviceClass, work: Work) -> float:
    """From being asked to the answer's arrival: down, compute, up. What is computed afterwards delays no round."""
    down_s, up_s = 8 * work.down_bytes / kind.down_bits_per_s, 8 * work.up_bytes / kind.up_bits_per_s
    return down_s + work.tokens_before / kind.train_tokens_per_s + up_s


def arrivals(
    world: DevicePopulation,
    devices: Sequence[str],
    work: Callable[[str], Work],
    *,
    concurrency: int,
    buffer_size: int,
    needed_bytes: int = 0,
) -> Iterator[Arrival]:
    """Answers and drop-outs in virtual order, without end, with `concurrency` devices at work, none of them twice.

    Where one ends, another begins, drawn uniformly from those that are idle and there; if none is found, `idle_s`
    later. `work` says what a device does, given its name. The version grows with every `buffer_size` answers. Not
    covered: a server that notices a drop-out only after a while, and what a stale answer weighs.
    """
    slots: list[tuple[float, int, Outcome | None, int]] = [(0.0, n, None, 0) for n in range(concurrency)]
    free_s, answered = dict.fromkeys(sorted(devices), 0.0), 0
    for number in count(concurrency):
        t_s, _, ended, version = heapq.heappop(slots)
        if ended:
            yield Arrival(t_s, ended, version, answered // buffer_size - version)
            answered += ended.outcome == "answers"
        begun = _begin(world, number, t_s, free_s, work, needed_bytes)
        heapq.heappush(slots, (t_s + _slot_s(world, begun), number, begun, answered // buffer_size))


def _begin(
    world: DevicePopulation, number: int, t_s: float, free_s: dict[str, float], work: Callable[[str], Work], needed: int
) -> Outcome | None:
    """The first device that is idle and there, of as many draws as there are devices; books its time."""
    names = list(free_s)
    for draw in range(len(names)):
        device = names[int(len(names) * uniform(world.seed, "next", number, draw))]
        if free_s[device] > t_s:
            continue
        fate = outcome_alone(world, number, t_s, device, work(device), needed)
        if fate.outcome in ("answers", "dropped-out"):
            free_s[device] = t_s + fate.busy_s
            return fate
    return None


def _slot_s(world: DevicePopulation, begun: Outcome | None) -> float:
    """Until the slot is free: at an answer's arrival, where a device dropped out, or when it is tried anew."""
    if begun is None:
        return world.settings.idle_s
    return begun.busy_s if begun.arrives_s is None else begun.arrives_s


def _duration_s(settings: WorldConfig, fates: Sequence[Outcome], wanted: int) -> float:
    """Until the last answer that counts; where too few count and others are still awaited, until the deadline."""
    counted = [f.arrives_s for f in fates if f.outcome == "answers" and f.arrives_s is not None]
    awaited = [f for f in fates if f.outcome in ("late", "dropped-out")]
    if counted and (len(counted) == wanted or not awaited):
        return max(counted)
    return settings.deadline_s or max(counted, default=settings.idle_s)


def _in_time(settings: WorldConfig, fate: Outcome) -> bool:
    return not settings.deadline_s or (fate.arrives_s is not None and fate.arrives_s <= settings.deadline_s)


def _by_arrival(fates: Iterable[Outcome]) -> list[Outcome]:
    """Earliest first; at the same time, by name."""
    return sorted(fates, key=lambda f: (math.inf if f.arrives_s is None else f.arrives_s, f.device))


def _done(kind: DeviceClass, work: Work, stops_s: float) -> Work:
    """The part of the work until a device stops: first it fetches, then it computes, then it sends."""
    down_bits = min(8 * work.down_bytes, stops_s * kind.down_bits_per_s)
    left_s = max(0.0, stops_s - 8 * work.down_bytes / kind.down_bits_per_s)
    tokens = min(work.tokens_before, left_s * kind.train_tokens_per_s)
    left_s = max(0.0, left_s - work.tokens_before / kind.train_tokens_per_s)
    up_bits = min(8 * work.up_bytes, left_s * kind.up_bits_per_s)
    return Work(tokens, 0, int(down_bits / 8), int(up_bits / 8))


def _spent(fate: Outcome, kind: DeviceClass, done: Work) -> Outcome:
    """With what the work that was done cost."""
    tokens, moved = done.tokens_before + done.tokens_after, done.down_bytes + done.up_bytes
    joules = tokens * kind.joules_per_token + moved * kind.joules_per_byte
    return replace(fate, energy_joules=joules, down_bytes=done.down_bytes, up_bytes=done.up_bytes)
