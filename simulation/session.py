"""What the driver of a simulation does beside the federation: evaluate, keep controls, write events, commit."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord

from client.lm.adapter import Adapters
from client.lm.lessons import Lesson
from client.lm.model import schedule
from client.phases import learn_personal
from client.shared import planned_event
from client.state import stage
from privacy.plan import RoundPlan
from privacy.seeds import derive_seed
from server.strategy import FedAvgReleases, to_numpy
from simulation.config import ExperimentConfig
from simulation.evaluate import (
    Arm,
    Measured,
    compare,
    derangement,
    measure_rouge,
    reply_arms,
    score_arms,
    token_lengths,
)
from simulation.host import SimulatedDevices
from simulation.runs import RunFolder

COMPARISONS = (
    ("nll", "personal", "base"),
    ("nll", "personal", "shuffled"),
    ("nll", "personal", "local"),
    ("nll", "personal", "shared"),
    ("nll", "shared", "base"),
    ("nll", "pooled", "base"),
    ("rouge1", "personal", "base"),
    ("rouge1", "personal", "shuffled"),
    ("rouge1", "shared", "base"),
)


@dataclass
class Session:
    """One run from the driver's side. `after_round` is the strategy's evaluation hook."""

    run: RunFolder
    devices: SimulatedDevices
    strategy: FedAvgReleases
    earlier_s: float = 0.0  # what the run took before it was stopped and resumed
    began: float = field(default_factory=time.perf_counter)

    @property
    def config(self) -> ExperimentConfig:
        return self.run.config

    @property
    def names(self) -> list[str]:
        return list(self.devices.users)

    def say(self, phase: str) -> None:
        if self.devices.site.listener:
            self.devices.site.listener(phase)

    def open(self) -> None:
        """The event that describes the run."""
        self.run.record("run", **describe(self.config, self.devices))

    def after_round(self, round_number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Notes → events, controls, evaluation, and last the checkpoint: with it the round is done."""
        numbers = to_numpy(arrays)
        shared = torch.from_numpy(self.devices.schema.join(numbers))
        seconds = self._device_events(round_number) if round_number else {}
        began = time.perf_counter()
        if round_number:
            self.say("control")
            self._local_control(round_number)
        seconds["control"] = time.perf_counter() - began
        began = time.perf_counter()
        if round_number < self.config.rounds and self.config.evaluation.every_round:
            self.say("evaluate")
            self._evaluate(round_number, self._arms(round_number, shared))
        seconds["evaluate"] = time.perf_counter() - began
        if round_number:
            self._round_event(round_number, shared, seconds)
        self.run.save_shared(round_number, numbers, self.strategy.heads)
        return None

    def finish(self, shared: torch.Tensor) -> None:
        """The verdict on the last round: all arms, replies, comparisons."""
        last, config = self.config.rounds, self.config
        arms = self._arms(last, shared)
        if config.evaluation.pooled_epochs:
            self.say("pooled")
            arms["pooled"] = [self._pooled()]
        self.say("evaluate")
        nll = self._evaluate(last, arms)
        self.say("reply")
        rouge, lengths = self._replies(arms)
        for name, measured in rouge.items():
            self._evaluation_event(last, name, "rouge1", measured)
        for k, device in enumerate(self.names):
            for arm in arms:
                facts = {"rouge1": rouge[arm].by_user[k], "mean_length_tokens": lengths[arm][k]} if rouge else {}
                queries = len(self.devices.users[device].held_out)
                self.run.record("result", device=device, arm=arm, nll=nll[arm].by_user[k], queries=queries, **facts)
        for metric, better, than in COMPARISONS if len(self.names) > 1 else ():  # one user has no interval
            table = nll if metric == "nll" else rouge
            if better in table and than in table:
                found = asdict(compare(table[better], table[than], lower_is_better=metric == "nll"))
                self.run.record("comparison", metric=metric, better=better, than=than, **found)

    def close(self, *, interrupted: bool) -> None:
        rounds = [e for e in self.run.events() if e["event"] == "device_round"]
        self.run.record(
            "end",
            wall_s=round(self.earlier_s + time.perf_counter() - self.began, 2),
            peak_rss_bytes=peak_rss_bytes(),
            tokens_trained=sum(e["tokens_trained"] for e in rounds),
            interrupted=interrupted,
        )

    # -- rounds -------------------------------------------------------------------------------------------------

    def _device_events(self, round_number: int) -> dict[str, float]:
        """One event a device; the seconds of each phase, summed over devices."""
        seconds: dict[str, float] = {}
        for device in self.strategy.sampled(round_number):
            notes = self.run.notes(device, round_number)
            if not notes["seconds"]:
                continue  # the device failed: the strategy counts it
            for phase, spent in notes.pop("seconds").items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
            tokens = notes.pop("shared_tokens", 0) + notes.pop("personal_tokens", 0)
            self.run.record("device_round", round=round_number, device=device, tokens_trained=tokens, **notes)
        return seconds

    def _round_event(self, round_number: int, shared: torch.Tensor, seconds: Mapping[str, float]) -> None:
        facts = self.strategy.facts[round_number]
        ratio = facts.signal_to_noise
        self.run.record(
            "round",
            round=round_number,
            devices=len(self.strategy.sampled(round_number)),
            releases=facts.releases,
            refused=facts.refused,
            seconds={k: round(v, 3) for k, v in seconds.items()},
            signal_to_noise=None if math.isnan(ratio) else ratio,
            change_norm_l2=facts.change_norm_l2,
            shared_norm_l2=float(shared.norm()),
            download_bytes=2 * self.devices.schema.size_bytes,  # to a device: before its training and after
        )

    def _local_control(self, round_number: int) -> None:
        """The `local` arm: the same buffers, steps and order as the personal adapters, no shared one beneath."""
        site, names = self.devices.site, self.strategy.sampled(round_number)
        states = []
        for name in names:
            state = self.devices.state(name, round_number)
            before = self.run.controls.latest(name, stage(round_number - 1))
            row = self.run.controls.load(name, before).personal if before else site.new_state(name).personal
            states.append(replace(state, personal=row))
        learned, _ = learn_personal(states, None, RoundPlan(round_number, round_number), site)
        self.run.controls.save(learned, stage(round_number))
        for name in names:
            self.run.controls.forget(name, until=stage(round_number - 1))

    # -- arms ---------------------------------------------------------------------------------------------------

    def _arms(self, round_number: int, shared_row: torch.Tensor) -> dict[str, Arm]:
        site, lm = self.devices.site, self.devices.site.lm
        shared = lm.adapters(site.shared_layout, shared_row)
        if round_number == 0:
            return {"base": []}
        personal = torch.stack([self.devices.state(n, round_number).personal for n in self.names])
        given = derangement(len(self.names), derive_seed(self.config.seed, "shuffled"))
        return {
            "base": [],
            "shared": [shared],
            "local": [lm.adapters(site.personal_layout, self._local_rows(round_number))],
            "personal": [shared, lm.adapters(site.personal_layout, personal)],
            "shuffled": [shared, lm.adapters(site.personal_layout, personal[given])],
        }

    def _local_rows(self, round_number: int) -> torch.Tensor:
        rows = []
        for name in self.names:
            found = self.run.controls.latest(name, stage(round_number))
            state = self.run.controls.load(name, found) if found else self.devices.site.new_state(name)
            rows.append(state.personal)
        return torch.stack(rows)

    def _pooled(self) -> Adapters:
        """One adapter trained on everything that all devices met, without privacy: the ceiling."""
        site, settings = self.devices.site, self.config.evaluation
        dialogues = [d for user in self.devices.users.values() for d in user.stream]
        examples = site.lm.format.dialogues(dialogues)
        order = schedule(
            len(examples), settings.pooled_batch_size, settings.pooled_epochs, derive_seed(self.config.seed, "pooled")
        )
        start = site.personal_layout.start(derive_seed(self.config.seed, "pooled", "start"))
        rates = [settings.pooled_learning_rate * (1 - s / len(order)) for s in range(len(order))]
        adapters = site.lm.adapters(site.personal_layout, start)
        return site.lm.engine.finetune(adapters, [], [Lesson(examples, order)], [rates]).adapters

    def _evaluate(self, round_number: int, arms: Mapping[str, Arm]) -> dict[str, Measured]:
        queries = [user.held_out for user in self.devices.users.values()]
        measured = score_arms(self.devices.site.lm, queries, arms)
        for name, found in measured.items():
            self._evaluation_event(round_number, name, "nll", found)
        return measured

    def _evaluation_event(self, round_number: int, arm: str, metric: str, measured: Measured) -> None:
        counts = {"users": len(measured.by_user), "queries": len(measured.by_query)}
        facts = {"round": round_number, "final": round_number == self.config.rounds, **counts}
        self.run.record("evaluation", arm=arm, metric=metric, **measured.summary(), **facts)

    def _replies(self, arms: Mapping[str, Arm]) -> tuple[dict[str, Measured], dict[str, list[float]]]:
        """ROUGE-1 and mean lengths in tokens, by arm; and a few replies before and after, for reading."""
        settings, lm = self.config.evaluation, self.devices.site.lm
        if not settings.rouge_queries_per_user:
            return {}, {}
        queries = [user.held_out[: settings.rouge_queries_per_user] for user in self.devices.users.values()]
        replies = reply_arms(lm, queries, arms, settings.sampling, derive_seed(self.config.seed, "reply") >> 1)
        count = len(self.names)
        lengths = {
            arm: [_mean(token_lengths(lm, [r for r in found if r.device == k])) for k in range(count)]
            for arm, found in replies.items()
        }
        shown = range(0, len(replies["base"]), max(1, len(replies["base"]) // max(1, settings.replies_shown)))
        for i in list(shown)[: settings.replies_shown]:
            before, after = replies["base"][i], replies["personal"][i]
            self.run.record(
                "replies",
                device=self.names[before.device],
                prompt=before.query.prompt,
                recorded=before.query.response,
                before=before.text,
                after=after.text,
            )
        return {arm: measure_rouge(found, count) for arm, found in replies.items()}, lengths


def describe(config: ExperimentConfig, devices: SimulatedDevices) -> dict[str, Any]:
    """The facts of a run that do not change: what, on what, under which promise."""
    lm, promise, event = devices.site.lm, config.privacy.promise, planned_event(config)
    return {
        "name": config.name,
        "engine": config.engine,
        "seed": config.seed,
        "rounds": config.rounds,
        "devices": len(devices.users),
        "model": {
            "name": lm.name,
            "parameters": sum(p.numel() for p in lm.engine.model.parameters()),
            "architecture": type(lm.engine.model).__name__,
            "dtype": str(lm.engine.dtype).removeprefix("torch."),
        },
        "data": {"name": config.data.name, "split": config.data.split},
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {lm.engine.device}",
        "versions": {name: version(name) for name in ("florilegium", "torch", "flwr", "opacus", "peft")},
        "privacy": {
            "mode": config.privacy.mode,
            "unit": promise.unit,
            "adjacency": promise.adjacency,
            "trust": promise.trust,
            "not_covered": promise.not_covered,
            "epsilon_budget": config.privacy.epsilon,
            "delta": config.privacy.delta,
            "noise_multiplier": event.noise_multiplier,
            "clip_norm_l2": config.privacy.clip_norm_l2,
            "sampling_rate": event.sampling_rate,
            "steps_per_round": event.steps,
            "accountant": "PLD",
        },
        "config": config.model_dump(mode="json"),
    }


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mean(values: list[int]) -> float:
    return sum(values) / max(1, len(values))
