"""What was it worth: the arms of a run on the evaluated devices' held-out replies, written down as events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch

from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.batching import schedule
from florilegium.client.lm.training_data import TrainingSet
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.devices.people import device_name
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.engines.scheduler import Scheduler
from florilegium.simulation.evaluation.arms import Arms, Asked, Rows, joined_late, personal_rows, replied, scored
from florilegium.simulation.evaluation.metrics import Measured, Reply, compare, derangement, measure_nll, measure_rouge
from florilegium.simulation.evaluation.person.verdict import whose
from florilegium.simulation.runs.arms import COMPARISONS
from florilegium.simulation.runs.events import (
    ArmComparison,
    DeviceResult,
    Evaluation,
    NewcomersComparison,
    NewcomersEvaluation,
    ShownReply,
)
from florilegium.simulation.runs.folder import RunFolder


@dataclass(frozen=True)
class Table:
    """A metric of several arms: of each, one figure of each of the devices `names`."""

    names: Sequence[str]
    arms: Mapping[str, Measured]


@dataclass
class Evaluator:
    """Evaluates the devices `names`; says to whoever watches what it does."""

    run: RunFolder
    devices: SimulatedDevices
    scheduler: Scheduler
    names: Sequence[str]

    @property
    def config(self) -> ExperimentConfig:
        return self.run.config

    def say(self, phase: str) -> None:
        self.scheduler.progress.enter(phase)

    def of_round(self, round_number: int, shared: torch.Tensor) -> None:
        """NLL of all arms after a round, with this shared adapter (P,): a point of the learning curves."""
        self.say("evaluate")
        self._evaluate(round_number, self._arms(round_number, shared))

    def verdict(self, shared: torch.Tensor) -> dict[str, float]:
        """The last round: all arms, replies, comparisons, newcomers. Returns what each device gained, in NLL."""
        last, config = self.config.rounds, self.config
        arms = self._arms(last, shared)
        if config.evaluation.pooled_epochs:
            self.say("pooled")
            arms = arms.with_arm("pooled", [Rows("personal", self._pooled().rows)])
        self.say("evaluate")
        nll = self._evaluate(last, arms)
        self.say("reply")
        replies = self._replies(arms)
        rouge, lengths = _by_rouge(replies)
        for name, measured in rouge.arms.items():
            self._evaluation_event(last, name, "rouge1", measured)
        self._results(nll, rouge, lengths)
        for metric, better, than in COMPARISONS:
            table = nll if metric == "nll" else rouge
            if len(table.names) > 1 and better in table.arms and than in table.arms:  # one user has no interval
                found = asdict(compare(table.arms[better], table.arms[than], lower_is_better=metric == "nll"))
                self.run.record(ArmComparison(metric=metric, better=better, than=than, **found))
        self.say("person")
        for event in whose(self.config, self.devices, self.scheduler, arms, replies):
            self.run.record(event)
        self._newcomers(shared)
        base, own = nll.arms["base"].by_user, nll.arms["personal"].by_user
        return {n: b - p for n, b, p in zip(nll.names, base, own, strict=True)}

    def _results(self, nll: Table, rouge: Table, lengths: Mapping[str, Sequence[float]]) -> None:
        """One event for each device and arm."""
        replied = {device: k for k, device in enumerate(rouge.names)}
        for k, device in enumerate(nll.names):
            queries = len(self.devices.users[device].held_out)
            for arm, measured in nll.arms.items():
                facts = {}
                if (at := replied.get(device)) is not None:
                    facts = {"rouge1": rouge.arms[arm].by_user[at], "mean_length_tokens": lengths[arm][at]}
                self.run.record(DeviceResult(device=device, arm=arm, nll=measured.by_user[k], queries=queries, **facts))

    def _arms(self, round_number: int, shared_row: torch.Tensor) -> Arms:
        if round_number == 0:
            return Arms(self.names, {"base": []})
        rows = self.scheduler.gather(personal_rows, self.names, round_number)
        names = [n for n in self.names if n in rows]
        personal, local = (torch.stack([rows[n][kind] for n in names]) for kind in ("personal", "local"))
        given = derangement(len(names), derive_seed(self.config.seed, "shuffled"))
        own, strangers = Rows("personal", personal), Rows("personal", personal[given])
        kept, alone = self.devices.duties.own, {"personal": [own], "shuffled": [strangers]}
        if self.config.server.absent:
            return Arms(names, {"base": [], **alone})
        shared = Rows("shared", shared_row[None])
        if kept == "none":
            return Arms(names, {"base": [], "shared": [shared], "personal": [shared]})
        if kept == "alone":
            return Arms(names, {"base": [], "shared": [shared], **alone})
        together = {"personal": [shared, own], "shuffled": [shared, strangers]}
        if self.config.baseline.name:  # what is shared may be a part of what a device needs
            return Arms(names, {"base": [], **together})
        arms = {"base": [], "shared": [shared], "local": [Rows("personal", local)], **together}
        return Arms(names, arms)

    def _pooled(self) -> Adapters:
        """One adapter trained on everything that the evaluated devices met, without privacy: the ceiling."""
        context, settings = self.devices.context, self.config.evaluation
        dialogues = [d for name in self.names for d in self.devices.users[name].stream]
        examples = context.lm.format.dialogues(dialogues)
        order = schedule(
            len(examples), settings.pooled_batch_size, settings.pooled_epochs, derive_seed(self.config.seed, "pooled")
        )
        start = context.personal_layout.start(derive_seed(self.config.seed, "pooled", "start"))
        rates = [settings.pooled_learning_rate * (1 - s / len(order)) for s in range(len(order))]
        adapters = context.lm.adapters(context.personal_layout, start)
        return context.lm.engine.finetune(adapters, [], [TrainingSet(examples, order)], [rates]).adapters

    def _evaluate(self, round_number: int, arms: Arms) -> Table:
        found = self.scheduler.gather_arms(scored, arms.names, arms)
        names = _of_all(found, arms.names)
        measured = {arm: measure_nll([found[arm][n] for n in names]) for arm in arms.arms}
        for name, figures in measured.items():
            self._evaluation_event(round_number, name, "nll", figures)
        return Table(names, measured)

    def _evaluation_event(self, round_number: int, arm: str, metric: str, measured: Measured) -> None:
        self.run.record(
            Evaluation(
                arm=arm,
                metric=metric,
                mean_per_user=measured.mean_per_user,
                mean_per_query=measured.mean_per_query,
                ci95=measured.ci95,
                round=round_number,
                final=round_number == self.config.rounds,
                users=len(measured.by_user),
                queries=len(measured.by_query),
            )
        )

    def _replies(self, arms: Arms) -> dict[str, dict[str, list[Reply]]]:
        """By arm and device the generated replies, and a few before and after, for reading."""
        settings, limit = self.config.evaluation, self.config.evaluation.rouge_queries_per_user
        if not limit:
            return {}
        counts = [min(limit, len(self.devices.users[n].held_out)) for n in arms.names]
        first = dict(zip(arms.names, accumulate([0, *counts]), strict=False))
        seed = derive_seed(self.config.seed, "reply") >> 1
        found = self.scheduler.gather_arms(replied, arms.names, Asked(arms, limit, settings.sampling, seed, first))
        names = _of_all(found, arms.names)
        replies = {arm: {n: found[arm][n] for n in names} for arm in arms.arms}
        self._show_replies(names, list(replies["base"].values()), list(replies["personal"].values()))
        return replies

    def _show_replies(
        self, names: Sequence[str], before: Sequence[Sequence[Reply]], after: Sequence[Sequence[Reply]]
    ) -> None:
        pairs = [
            (name, b, a)
            for name, of_base, of_personal in zip(names, before, after, strict=True)
            for b, a in zip(of_base, of_personal, strict=True)
        ]
        shown = self.config.evaluation.replies_shown
        for name, b, a in pairs[:: max(1, len(pairs) // max(1, shown))][:shown]:
            recorded = b.query.response
            self.run.record(
                ShownReply(device=name, prompt=b.query.prompt, recorded=recorded, before=b.text, after=a.text)
            )

    def _newcomers(self, shared: torch.Tensor) -> None:
        """What the shared adapter is worth to people who never took part."""
        users, count = self.config.data.users, self.config.evaluation.newcomers
        names = [device_name(k) for k in range(users, users + count)]
        if not names:
            return
        self.say("newcomers")
        found = self.scheduler.gather_arms(joined_late, names, None if self.config.server.absent else shared)
        names = _of_all(found, names)
        measured = {arm: measure_nll([of[n] for n in names]) for arm, of in found.items()}
        for arm, figures in measured.items():
            self.run.record(
                NewcomersEvaluation(
                    arm=arm,
                    metric="nll",
                    users=len(names),
                    mean_per_user=figures.mean_per_user,
                    mean_per_query=figures.mean_per_query,
                    ci95=figures.ci95,
                )
            )
        for better, than in (("shared", "base"), ("personal", "base"), ("personal", "shared")):
            if len(names) < 2 or not {better, than} <= measured.keys():
                continue
            difference = asdict(compare(measured[better], measured[than], lower_is_better=True))
            self.run.record(NewcomersComparison(metric="nll", better=better, than=than, **difference))


def _by_rouge(replies: Mapping[str, Mapping[str, Sequence[Reply]]]) -> tuple[Table, dict[str, list[float]]]:
    """ROUGE-1 and mean lengths in tokens, by arm."""
    if not replies:
        return Table([], {}), {}
    lengths = {arm: [_mean([r.tokens for r in few]) for few in of.values()] for arm, of in replies.items()}
    measured = {arm: measure_rouge(list(of.values())) for arm, of in replies.items()}
    return Table(list(replies["base"]), measured), lengths


def _of_all(found: Mapping[str, Mapping[str, object]], names: Sequence[str]) -> list[str]:
    """The devices that are there under every arm: all, but for those whose failure was counted."""
    return [n for n in names if all(n in of_arm for of_arm in found.values())]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / max(1, len(values))
