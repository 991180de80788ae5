"""What the driver of a simulation does beside the federation: controls, events, evaluation, checkpoints."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from flwr.app import ArrayRecord, MetricRecord

from florilegium.privacy.seeds import derive_seed
from florilegium.server.release_collector import to_numpy
from florilegium.server.strategy import ReleaseStrategy
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.devices.people import device_name
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.engines.scheduler import Scheduler
from florilegium.simulation.evaluation.arms import learn_without_server, noted
from florilegium.simulation.evaluation.evaluator import Evaluator
from florilegium.simulation.evaluation.fairness import summarize
from florilegium.simulation.heterogeneity.clock import Clock, as_event
from florilegium.simulation.runs.callbacks import Callback, Callbacks
from florilegium.simulation.runs.description import describe, peak_rss_bytes
from florilegium.simulation.runs.folder import RunFolder


@dataclass
class RunRecorder:
    """One run from the driver's side. `after_round` is the strategy's evaluation hook."""

    run: RunFolder
    devices: SimulatedDevices
    strategy: ReleaseStrategy
    scheduler: Scheduler
    clock: Clock | None = None
    others: Sequence[Callback] = ()  # than those of the settings
    earlier_s: float = 0.0  # what the run took before it was stopped and resumed
    began: float = field(default_factory=time.perf_counter)

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
        failures = (e for e in self.run.events() if e["event"] == "failure" and e["what"] == "control")
        without = {e["device"] for e in failures}
        return Evaluator(self.run, self.devices, self.scheduler, [n for n in self.names if n not in without])

    @cached_property
    def callbacks(self) -> Callbacks:
        return Callbacks(self.run, self.others)

    def say(self, phase: str) -> None:
        self.scheduler.progress.enter(phase)

    def open(self) -> None:
        """The event that describes the run."""
        self.run.record("run", **describe(self.config, self.devices))

    def recall(self) -> None:
        """Takes what a world's clock has to know back from the events of a run that goes on."""
        for event in self.run.events() if self.clock else ():
            if event["event"] == "world" and self.clock:
                self.clock.recall(event)

    def after_round(self, round_number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Notes → events, controls, evaluation, and last the checkpoint: with it the round is done."""
        self._failed(round_number)
        numbers = to_numpy(arrays)
        shared = torch.from_numpy(self.strategy.whole.join(numbers))
        asked = self.strategy.sampled(round_number) if round_number else []
        seconds = self._device_events(round_number, asked) if round_number else {}
        began = time.perf_counter()
        if round_number and not self.config.server.absent:
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
        if round_number:
            self._round_event(round_number, asked, shared, seconds)
        self.run.save_shared(round_number, numbers, self.strategy.heads, self.strategy.moments.arrays())
        if round_number:
            self.callbacks.end_round(round_number)
        return None

    def finish(self, shared: torch.Tensor) -> None:
        """The verdict on the last round, and in a world to whom it was fair."""
        gain = self.examiner.verdict(shared)
        self._failed(self.config.rounds)
        if self.clock:
            replies = {n: float(len(self.devices.users[n].stream)) for n in gain}
            rounds = [self.clock.rounds[n] for n in sorted(self.clock.rounds)]
            everybody = [device_name(k) for k in range(self.config.data.users)]
            self.run.record("fairness", **summarize(rounds, self.clock.world, everybody, gain, replies))

    def close(self, *, interrupted: bool) -> None:
        self.run.record(
            "end",
            wall_s=round(self.earlier_s + time.perf_counter() - self.began, 2),
            peak_rss_bytes=peak_rss_bytes(),
            tokens_trained=sum(e["tokens_trained"] for e in self.run.events() if e["event"] == "device_round"),
            devices_bytes=self.run.shards.size_bytes,
            interrupted=interrupted,
        )
        self.callbacks.end(interrupted=interrupted)

    def _failed(self, round_number: int) -> set[str]:
        """Writes down the faults that were counted since it was last asked; returns whose they are.

        Raises `TooManyFailedError`.
        """
        self.scheduler.check()
        failures = self.scheduler.taken()
        events = [{"round": round_number, "device": f.device, "what": f.what, "error": f.error} for f in failures]
        self.run.record_all("failure", events)
        return {f.device for f in failures}

    # -- rounds -------------------------------------------------------------------------------------------------

    def _device_events(self, round_number: int, asked: Sequence[str]) -> dict[str, float]:
        """One event a device; the seconds of each phase, summed over devices."""
        seconds: dict[str, float] = {}
        notes = self.scheduler.gather(noted, asked, round_number)
        events = []
        for device, page in sorted(notes.items()):
            if not page:
                continue  # the device failed, or was not there: the strategy counts it
            for phase, spent in page.pop("seconds").items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
            tokens = page.pop("shared_tokens", 0) + page.pop("personal_tokens", 0)
            events.append({"round": round_number, "device": device, "tokens_trained": tokens, **page})
        self.run.record_all("device_round", events)
        self.scheduler.progress.end_round(round_number, sum(e["tokens_trained"] for e in events))
        return seconds

    def _round_event(
        self, round_number: int, asked: Sequence[str], shared: torch.Tensor, seconds: Mapping[str, float]
    ) -> None:
        facts = self.strategy.facts[round_number]
        ratio = facts.signal_to_noise
        if self.clock:
            self.run.record("world", **as_event(self.clock.round(round_number, asked)))
        self.run.record(
            "round",
            round=round_number,
            devices=len(asked),
            releases=facts.releases,
            silent=facts.silent,
            refused=facts.refused,
            failed_adoptions=facts.failed_adoptions,
            averaging_error=facts.averaging_error,
            held_bytes=facts.held_bytes,
            seconds={k: round(v, 3) for k, v in seconds.items()},
            signal_to_noise=None if math.isnan(ratio) else ratio,
            signal_to_noise_floor=None if math.isnan(ratio) else facts.signal_to_noise_floor,
            change_norm_l2=facts.change_norm_l2,
            shared_norm_l2=float(shared.norm()),
            download_bytes=self._download_bytes,
        )

    @property
    def _download_bytes(self) -> int:
        """To a device in a round: before its training and after."""
        return 0 if self.config.server.absent else 2 * self.strategy.whole.size_bytes
