"""A simulated run from its driver's side: after each round events, controls, evaluation, and last the checkpoint."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from florilegium.client.calibration import planned_event
from florilegium.client.lm.peft_format import shared_files, write_files, write_peft
from florilegium.client.lm.places import ADAPTERS, base_of, copy_base
from florilegium.client.observation import Observation
from florilegium.privacy.common.machine import cores, peak_rss_bytes
from florilegium.privacy.seeds import derive_seed
from florilegium.server.release_collector import to_numpy
from florilegium.server.strategy import ReleaseStrategy
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.population import Bootstrapped, met_before
from florilegium.simulation.devices.people import UsersByDevice, device_name
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.engines.scheduler import Scheduler
from florilegium.simulation.engines.strategy import open_strategy
from florilegium.simulation.evaluation.arms import learn_without_server, observed
from florilegium.simulation.evaluation.evaluator import Evaluator
from florilegium.simulation.evaluation.fairness import summarize
from florilegium.simulation.heterogeneity.clock import Clock, as_event
from florilegium.simulation.rounds import Recorder, federate
from florilegium.simulation.runs.callbacks import Callback, Callbacks
from florilegium.simulation.runs.events import (
    DataFacts,
    DeviceFailure,
    DeviceRound,
    ModelFacts,
    PrivacyFacts,
    RoundEnd,
    RunEnd,
    RunStart,
    WorldRound,
)
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.runs.provenance import sources_sha256
from florilegium.simulation.runs.timing import START


@dataclass
class RunRecorder(Recorder):
    """What a run's folder has of its federation."""

    run: RunFolder
    devices: SimulatedDevices
    strategy: ReleaseStrategy
    scheduler: Scheduler
    clock: Clock | None = None
    others: Sequence[Callback] = ()  # than those of the settings
    earlier_s: float = 0.0  # what the run took before it was stopped and resumed
    began: float = field(default_factory=time.perf_counter)
    started_s: float = 0.0  # until the first round began

    @property
    def config(self) -> ExperimentConfig:
        return self.run.config

    @cached_property
    def names(self) -> list[str]:
        """The devices that are evaluated: all, or so many of those that are asked most often."""
        count, config = self.config.evaluation.users, self.config
        if not count:
            return [device_name(k) for k in range(config.data.users)]
        asked = Counter(name for n in range(1, config.rounds + 1) for name in self.strategy.sampled(n))
        return sorted(asked, key=lambda name: (-asked[name], derive_seed(config.seed, name, "evaluated")))[:count]

    @cached_property
    def examiner(self) -> Evaluator:
        without = {e.device for e in self.run.events_of(DeviceFailure) if e.what == "control"}
        return Evaluator(self.run, self.devices, self.scheduler, [n for n in self.names if n not in without])

    @cached_property
    def callbacks(self) -> Callbacks:
        return Callbacks(self.run, self.others)

    @property
    def wall_s(self) -> float:
        """What the run has taken so far, also before it was stopped and resumed."""
        return round(self.earlier_s + time.perf_counter() - self.began, 2)

    def say(self, phase: str) -> None:
        self.scheduler.progress.enter(phase)

    def check(self) -> None:
        """Raises `TooManyFailedError`, or what another process has left."""
        self.scheduler.check()

    def open(self) -> None:
        """Begins the stream of events, or drops what comes after the last round that was finished."""
        if not self.run.has_rounds:
            self.run.metrics.unlink(missing_ok=True)
            self.run.record(describe(self.config, self.devices))
            self.callbacks.begin(0)
            return
        ends = [e.wall_s for e in self.run.events_of(RunEnd)]
        rounds = [e.wall_s or 0.0 for e in self.run.events_of(RoundEnd)]
        self.earlier_s = max([*ends, *rounds], default=0.0)  # a run that was killed told it after its last round
        self.run.rewind(self.strategy.first_round - 1)
        if self.clock:
            for event in self.run.events_of(WorldRound):
                self.clock.recall(event)
        self.callbacks.begin(self.strategy.first_round - 1)

    def after_round(self, round_number: int, arrays: ArrayRecord) -> None:
        """Notes → events, controls, evaluation, and last the checkpoint: with it the round is done."""
        self._failed(round_number)
        numbers = to_numpy(arrays)
        shared = torch.from_numpy(self.strategy.whole.join(numbers))
        asked = self.strategy.sampled(round_number) if round_number else []
        seconds = self._device_events(round_number, asked) if round_number else {}
        began = time.perf_counter()
        if round_number and not (self.config.server.absent or self.config.baseline.name):
            self.say("control")
            took_part = set(asked)
            self.scheduler.gather(learn_without_server, [n for n in self.names if n in took_part], round_number)
            without = self._failed(round_number)
            self.examiner.names = [n for n in self.examiner.names if n not in without]
        seconds["control"] = time.perf_counter() - began
        began = time.perf_counter()
        if round_number < self.config.rounds and self.config.evaluation.every_round:
            self.examiner.of_round(round_number, shared)
            self._failed(round_number)
        seconds["evaluate"] = time.perf_counter() - began
        if round_number == 1:
            seconds[START] = self.started_s
        if round_number:
            self._round_event(round_number, asked, shared, seconds)
        else:
            self.started_s = self.wall_s
        self.run.save_shared(round_number, numbers, self.strategy.ledger_heads, self.strategy.moments.arrays())
        if round_number:
            self.callbacks.end_round(round_number)

    def finish(self, shared: torch.Tensor) -> None:
        """The verdict on the last round, in a world to whom it was fair, and the adapters."""
        gain = self.examiner.verdict(shared)
        self._failed(self.config.rounds)
        if self.clock:
            replies = {n: float(len(self.devices.users[n].stream)) for n in gain}
            rounds = [self.clock.rounds[n] for n in sorted(self.clock.rounds)]
            everybody = [device_name(k) for k in range(self.config.data.users)]
            self.run.record(summarize(rounds, self.clock.world, everybody, gain, replies))
        export_adapters(self.run, self.devices, shared, self.names)

    def close(self, *, interrupted: bool) -> None:
        self.run.record(
            RunEnd(
                wall_s=self.wall_s,
                peak_rss_bytes=peak_rss_bytes(),
                tokens_trained=sum(e.tokens_trained for e in self.run.events_of(DeviceRound)),
                devices_bytes=self.run.shards.size_bytes,
                interrupted=interrupted,
            )
        )
        self.callbacks.end(interrupted=interrupted)

    def _failed(self, round_number: int) -> set[str]:
        """Writes down the faults that were counted since it was last asked; returns whose they are.

        Raises `TooManyFailedError`.
        """
        self.scheduler.check()
        failures = self.scheduler.taken()
        self.run.record_all(
            DeviceFailure(round=round_number, device=f.device, what=f.what, error=f.error) for f in failures
        )
        return {f.device for f in failures}

    # -- rounds -------------------------------------------------------------------------------------------------

    def _device_events(self, round_number: int, asked: Sequence[str]) -> dict[str, float]:
        """One event a device; the seconds of each phase, summed over devices."""
        seconds: dict[str, float] = {}
        events = []
        for device, seen in sorted(self.scheduler.gather(observed, asked, round_number).items()):
            if seen == Observation():
                continue  # the device failed, or was not there: the strategy counts it
            for phase, spent in seen.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
            events.append(_device_round(round_number, device, seen))
        self.run.record_all(events)
        self.scheduler.progress.end_round(round_number, sum(e.tokens_trained for e in events))
        return seconds

    def _round_event(
        self, round_number: int, asked: Sequence[str], shared: torch.Tensor, seconds: Mapping[str, float]
    ) -> None:
        facts = self.strategy.facts[round_number]
        ratio = facts.signal_to_noise
        if self.clock:
            self.run.record(as_event(self.clock.round(round_number, asked)))
        self.run.record(
            RoundEnd(
                round=round_number,
                devices=len(asked),
                releases=facts.releases,
                silent=facts.silent,
                refused=facts.refused,
                failed_adoptions=facts.failed_adoptions,
                averaging_error=facts.averaging_error,
                held_bytes=facts.held_bytes,
                seconds={k: round(v, 3) for k, v in seconds.items()},
                wall_s=self.wall_s,
                signal_to_noise=None if math.isnan(ratio) else ratio,
                signal_to_noise_floor=None if math.isnan(ratio) else facts.signal_to_noise_floor,
                change_norm_l2=facts.change_norm_l2,
                shared_norm_l2=float(shared.norm()),
                download_bytes=self._download_bytes,
            )
        )

    @property
    def _download_bytes(self) -> int:
        """To a device in a round: before its training and after."""
        return 0 if self.config.server.absent else 2 * self.strategy.whole.size_bytes


def federate_run(
    run: RunFolder,
    grid: Grid,
    scheduler: Scheduler,
    clock: Clock | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """All rounds of a run over a grid, from the last one that was finished, and the verdict."""
    devices = scheduler.devices
    strategy, start = open_strategy(run, devices.context, clock, scheduler.check)
    recorder = RunRecorder(run, devices, strategy, scheduler, clock, callbacks)
    federate(grid, strategy, recorder, start, run.config.rounds)


def export_adapters(run: RunFolder, devices: SimulatedDevices, shared: torch.Tensor, names: Sequence[str]) -> None:
    """`adapters/shared`, and of the evaluated devices `adapters/personal/<device>`, as plain `peft` reads them.

    With `adapters/base` where the base is a model that other machines do not find by its name.
    """
    context, last, folder = devices.context, devices.context.config.rounds, run.path / ADAPTERS
    base = base_of(context.lm.name)
    copy_base(base, folder)
    if not run.config.server.absent:
        write_files(folder, shared_files(context.shared_layout, shared, base))
    for name, state in zip(names, devices.states(names, last), strict=True):
        if len(state.personal):
            write_peft(folder / "personal" / name, context.personal_layout, state.personal, base)


def describe(config: ExperimentConfig, devices: SimulatedDevices) -> RunStart:
    """The facts of a run that do not change: what, on what, under which promise."""
    lm, promise, event = devices.context.lm, config.privacy.promise, planned_event(config)
    return RunStart(
        name=config.name,
        engine=config.engine.name,
        seed=config.seed,
        rounds=config.rounds,
        devices=config.data.users,
        model=ModelFacts(
            name=lm.name,
            parameters=lm.parameters,
            architecture=lm.architecture,
            dtype=str(lm.engine.dtype).removeprefix("torch."),
        ),
        data=people(config, devices.users),
        hardware=f"{cores()} cores, {lm.engine.device}",
        versions={name: version(name) for name in ("florilegium", "torch", "flwr", "opacus", "peft")},
        privacy=PrivacyFacts(
            mode=config.privacy.mode,
            unit=promise.unit,
            adjacency=promise.adjacency,
            trust=promise.trust,
            not_covered=promise.not_covered,
            epsilon_budget=config.privacy.epsilon,
            delta=config.privacy.delta,
            noise_multiplier=event.noise_multiplier,
            clip_norm_l2=config.privacy.clip_norm_l2,
            sampling_rate=event.sampling_rate,
            steps_per_round=event.steps,
            accountant="PLD",
        ),
        sources=sources_sha256(config.extensions()),
        config=config.model_dump(mode="json"),
    )


def people(config: ExperimentConfig, users: UsersByDevice) -> DataFacts:
    """How many there are, without those that are resampled from others, and what is held out of what they said."""
    population = users.population
    persons = population.people if isinstance(population, Bootstrapped) else population
    return DataFacts(
        name=config.data.name,
        split=config.data.split,
        people=len(persons),
        held_out=sum(len(user.held_out) for user in persons),
        held_out_met=sum(met_before(user.stream, user.held_out) for user in persons),
    )


def _device_round(number: int, device: str, seen: Observation) -> DeviceRound:
    tokens = (seen.shared_tokens or 0) + (seen.personal_tokens or 0)
    apart = ("seconds", "shared_tokens", "personal_tokens")
    facts: dict[str, Any] = {"epsilon": None, **{k: v for k, v in seen.seen().items() if k not in apart}}
    return DeviceRound(round=number, device=device, tokens_trained=tokens, **facts)
