"""What a run leaves for programs: its figures in `summary.json`, one line per device and arm in `results.jsonl`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from florilegium.simulation.runs.arms import ARMS
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import (
    ArmComparison,
    Change,
    DeviceFailure,
    DeviceResult,
    DeviceRound,
    Evaluation,
    Event,
    Interval,
    NewcomersComparison,
    NewcomersEvaluation,
    PersonComparison,
    PersonMeasure,
    RoundEnd,
    RunEnd,
    RunStart,
    WorldFairness,
)
from florilegium.simulation.runs.folder import Kind, RunFolder
from florilegium.simulation.runs.mean_observer import bystander
from florilegium.simulation.runs.timing import wall_by_phase

SUMMARY, RESULTS = "summary.json", "results.jsonl"
SUMMED = ("arrived", "accepted", "synthetic_kept", "synthetic_rejected", "truncated")


@dataclass(frozen=True, kw_only=True)
class ArmFigures:
    """One metric of one arm after the last round; the interval is of the mean over users."""

    mean_per_user: float
    mean_per_query: float
    ci95: Interval


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The figures of a run that was finished. The order of the fields is that of the keys in `summary.json`."""

    name: str
    devices: int
    rounds: int
    changed: tuple[Change, ...] = ()
    seed: int
    engine: str
    server: str  # its rule
    baseline: str = ""  # in place of the devices' own method
    model: str
    hardware: str
    nll: dict[str, ArmFigures]  # by arm
    rouge1: dict[str, ArmFigures]
    comparisons: tuple[ArmComparison, ...]
    person: tuple[PersonMeasure, ...] = ()
    person_comparisons: tuple[PersonComparison, ...] = ()
    mean_length_tokens: dict[str, float]  # of replies, by arm
    annotations_per_device: float
    acceptance_rate: float
    synthetic_kept: int
    synthetic_rejected: int
    truncated: int
    failed_trainings: tuple[str, ...]
    failures: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    epsilon: float  # the largest that a device has spent
    epsilon_of_mean: float | None = None  # towards who sees only the means
    fewest_releases: int | None = None  # of such a mean
    delta: float
    noise_multiplier: float
    privacy_mode: str
    privacy_unit: str
    adjacency: str
    trust: str
    signal_to_noise: tuple[float | None, ...]  # by round
    signal_to_noise_floor: tuple[float | None, ...] = ()
    upload_bytes_per_release: int
    download_bytes_per_round: int | None
    newcomers: dict[str, ArmFigures]  # NLL, by arm
    newcomers_comparisons: tuple[NewcomersComparison, ...]
    world: WorldFairness | None
    people: int
    held_out: int = 0
    held_out_met: int = 0
    devices_bytes: int
    wall_s: float
    wall_by_phase_s: dict[str, float] = field(default_factory=dict)  # the longest first
    peak_rss_bytes: int
    tokens_trained: int


def write_summary(run: RunFolder) -> RunSummary:
    """Writes `summary.json` and one line per device and arm in `results.jsonl`, both from the events."""
    summary = summarize(run.events())
    with (run.path / RESULTS).open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(_as_recorded(e)) + "\n" for e in run.events_of(DeviceResult))
    text = json.dumps(vars(summary), indent=1, default=_plain)
    (run.path / SUMMARY).write_text(text + "\n", encoding="utf-8")
    return summary


def read_summary(folder: Path) -> RunSummary:
    """What `write_summary` has left in a run's folder; raises `RunError` where there is none that can be read."""
    path = folder / SUMMARY
    try:
        return _adapter().validate_python(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run has not been finished; go on with --resume") from None
    except (ValueError, ValidationError) as error:
        raise RunError(f"{path} is no summary of a run ({str(error).splitlines()[0]})") from None


@cache
def _adapter() -> TypeAdapter[RunSummary]:
    return TypeAdapter(RunSummary)


def _as_recorded(event: Event) -> dict[str, Any]:
    return {"event": event.kind, "time": event.time} | event.facts()


def _plain(value: Any) -> dict[str, Any]:
    return value.facts() if isinstance(value, Event) else asdict(value)


@dataclass
class DeviceTotals:
    """Of all devices in all rounds, taken in one event after the other."""

    sums: Counter[str] = field(default_factory=Counter)
    annotations: dict[str, int] = field(default_factory=dict)  # by device, so far
    failed: list[str] = field(default_factory=list)
    epsilon: float = 0.0  # the largest
    upload_bytes: int = 0  # of the largest release

    def add(self, event: DeviceRound) -> None:
        self.sums.update({key: getattr(event, key) or 0 for key in SUMMED})
        self.annotations[event.device] = event.annotations
        if event.personal_failed is not None:
            self.failed.append(f"{event.device}: {event.personal_failed}")
        self.epsilon = max(self.epsilon, event.epsilon or 0.0)
        self.upload_bytes = max(self.upload_bytes, event.upload_bytes)


def summarize(events: Iterable[Event]) -> RunSummary:
    """The figures of a run that was finished."""
    others: list[Event] = []
    devices = DeviceTotals()
    for event in events:
        if isinstance(event, DeviceRound):  # of which there may be millions
            devices.add(event)
        else:
            others.append(event)
    start, end, rounds = _all(others, RunStart)[0], _all(others, RunEnd)[-1], _all(others, RoundEnd)
    final = [e for e in _all(others, Evaluation) if e.final]
    worlds, seen = _all(others, WorldFairness), bystander(start, rounds)
    return RunSummary(
        name=start.name,
        devices=start.devices,
        rounds=start.rounds,
        changed=start.changed or (),
        seed=start.seed,
        engine=start.engine,
        server=start.config["server"]["rule"],
        baseline=start.config.get("baseline", {}).get("name", ""),
        model=start.model.name,
        hardware=start.hardware,
        nll={e.arm: _figures(e) for e in final if e.metric == "nll"},
        rouge1={e.arm: _figures(e) for e in final if e.metric == "rouge1"},
        comparisons=tuple(_all(others, ArmComparison)),
        person=tuple(_all(others, PersonMeasure)),
        person_comparisons=tuple(_all(others, PersonComparison)),
        mean_length_tokens=_mean_lengths(_all(others, DeviceResult)),
        annotations_per_device=_mean(list(devices.annotations.values())),
        acceptance_rate=devices.sums["accepted"] / max(1, devices.sums["arrived"]),
        synthetic_kept=devices.sums["synthetic_kept"],
        synthetic_rejected=devices.sums["synthetic_rejected"],
        truncated=devices.sums["truncated"],
        failed_trainings=tuple(devices.failed),
        failures=dict(Counter(e.what for e in _all(others, DeviceFailure))),
        refused=dict(sum((Counter(e.refused) for e in rounds), Counter[str]())),
        epsilon=devices.epsilon,
        epsilon_of_mean=seen.epsilon if seen else None,
        fewest_releases=seen.releases if seen else None,
        delta=start.privacy.delta,
        noise_multiplier=start.privacy.noise_multiplier,
        privacy_mode=start.privacy.mode,
        privacy_unit=start.privacy.unit,
        adjacency=start.privacy.adjacency,
        trust=start.privacy.trust,
        signal_to_noise=tuple(e.signal_to_noise for e in rounds),
        signal_to_noise_floor=tuple(e.signal_to_noise_floor for e in rounds),
        upload_bytes_per_release=devices.upload_bytes,
        download_bytes_per_round=rounds[-1].download_bytes,
        newcomers={e.arm: _figures(e) for e in _all(others, NewcomersEvaluation)},
        newcomers_comparisons=tuple(_all(others, NewcomersComparison)),
        world=worlds[-1] if worlds else None,
        people=start.data.people,
        held_out=start.data.held_out,
        held_out_met=start.data.held_out_met,
        devices_bytes=end.devices_bytes,
        wall_s=end.wall_s,
        wall_by_phase_s=wall_by_phase(rounds, end),
        peak_rss_bytes=end.peak_rss_bytes,
        tokens_trained=end.tokens_trained,
    )


def _all(events: Iterable[Event], kind: type[Kind]) -> list[Kind]:
    return [e for e in events if isinstance(e, kind)]


def _figures(event: Evaluation | NewcomersEvaluation) -> ArmFigures:
    return ArmFigures(mean_per_user=event.mean_per_user, mean_per_query=event.mean_per_query, ci95=event.ci95)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _mean_lengths(results: Sequence[DeviceResult]) -> dict[str, float]:
    lengths: dict[str, list[float]] = {}
    for e in results:
        if e.mean_length_tokens is not None:
            lengths.setdefault(e.arm, []).append(e.mean_length_tokens)
    return {arm: _mean(lengths[arm]) for arm in ARMS if arm in lengths}
