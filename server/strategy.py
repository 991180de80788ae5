"""Rounds of releases, as a Flower strategy: who is asked, what is refused, what the rest becomes.

Differs from Flower's own strategies: all releases weigh the same, because a true number of examples never leaves a
device; devices are sampled by our own generator over our own names; replies are summed as they come; a run can begin
at a later round; the aggregated adapter goes back at once, so that personal adapters learn on the version they will be
used with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from florilegium.privacy.common.errors import UserError
from florilegium.privacy.noise import ReleaseNoise
from florilegium.privacy.release import Array as Numbers
from florilegium.privacy.release import Schema
from florilegium.privacy.reply_gate import NO_RELEASE
from florilegium.privacy.secure_aggregation.wire import RECORD, Told
from florilegium.privacy.seeds import derive_seed
from florilegium.server.config import ServerConfig, devices_to_ask
from florilegium.server.lora_products import MeanOfProducts
from florilegium.server.optimizers import Moments, new_optimizer, step_at
from florilegium.server.release_collector import (
    Limits,
    ReleaseCollector,
    RoundFacts,
    signal_to_noise,
    signal_to_noise_floor,
    to_arrays,
    to_numpy,
)
from florilegium.server.secure_round import SecureRound, SumTerms

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


class NoReleaseError(UserError):
    """A round ended without a single release."""


@dataclass(frozen=True)
class ServerState:
    """What a server has between two rounds: all that it needs to go on."""

    round: int  # that is over
    shared: ArrayRecord  # what devices are sent next
    ledger_heads: Mapping[str, str]  # device → head of its ledger with its last release
    moments: Moments


@dataclass(frozen=True)
class Aggregate(ServerState):
    """What a round came to, before any device has it. Made twice, of other releases, it would show its noise."""

    facts: RoundFacts


NO_LIMITS = Limits()
TOO_FEW = "too-few"  # releases for the rule, or for the terms
Commit = Callable[[Aggregate], None]


class ReleaseStrategy(Strategy):
    """Releases of the sampled devices by the server's rule, applied by its optimizer."""

    def __init__(
        self,
        config: ServerConfig,
        schema: Schema,
        seed: int,
        noise: ReleaseNoise,
        *,
        limits: Limits = NO_LIMITS,
        over_sampling: float = 1.0,
        least_releases: int = 0,
        commit: Commit | None = None,
        sums: SumTerms | None = None,
    ) -> None:
        """`noise` says what devices have added, a public value, and what is added here where they trust the server.

        `limits` bound what a release may be; of fewer than `least_releases`, or than the rule needs, nothing is made.
        `commit` stores an aggregate before any device gets it. With `sums` a round's sum is all that is learned of it.
        """
        self.config, self.schema, self.seed, self.noise = config, schema, seed, noise
        self.limits, self.over_sampling, self.commit, self.sums = limits, over_sampling, commit, sums
        self.least_releases = max(least_releases, config.least_releases)
        self.optimizer = new_optimizer(config.optimizer, config)
        self.moments = self.optimizer.start(schema.width)
        self.whole = schema if config.products == "average" else schema.with_weights()  # what devices are sent
        self.names: list[str] = []  # of all devices, sorted
        self.nodes: dict[str, int] = {}  # device → Flower's node id
        self.devices: dict[int, str] = {}  # the inverse
        self.ledger_heads: dict[str, str] = {}  # device → head of its ledger with its last release
        self.first_round = 1
        self.committed: Aggregate | None = None  # of the first round, if that was aggregated before
        self.facts: dict[int, RoundFacts] = {}
        self._sent = ArrayRecord()  # in the round that is under way: Flower's `aggregate_train` is not told

    def summary(self) -> None:
        """Nothing to say: the simulation prints its own."""

    def begin(self, start: Numbers) -> ArrayRecord:
        """What devices are sent before any release: the shared adapter's start (P,)."""
        return to_arrays(self.whole.split(np.pad(start, (0, self.whole.width - start.size))))

    def at(self, state: ServerState, committed: Aggregate | None = None) -> ArrayRecord:
        """Goes on after a round that is over; `committed` is what the next one came to, if it was so far.

        Returns what devices are sent.
        """
        self.first_round, self.committed = state.round + 1, committed
        self.ledger_heads, self.moments = dict(state.ledger_heads), state.moments
        return state.shared

    def greet(self, grid: Grid) -> None:
        """Learns which device is behind each node; node ids are random, names are not."""
        if self.nodes:
            return
        nothing = RecordDict({"arrays": ArrayRecord(), "plan": ConfigRecord()})
        asked = [_message(nothing, node, MessageType.QUERY) for node in grid.get_node_ids()]
        for reply in grid.send_and_receive(asked, timeout=self.config.reply_timeout_s):
            header = _header(reply)
            if "device" in header:
                self.nodes[str(header["device"])] = reply.metadata.src_node_id
        if not self.nodes:
            raise NoReleaseError("no device answered the server's greeting")
        self.names, self.devices = sorted(self.nodes), {node: name for name, node in self.nodes.items()}

    def sampled(self, server_round: int) -> list[str]:
        """The devices that are asked in a round, by name, from the experiment's seed.

        As many as make an aggregate at least. With correlated noise a device is asked every `bands` rounds: each is in
        one of so many groups.
        """
        if self.noise.bands > 1:
            group = server_round % self.noise.bands
            return [n for n in self.names if derive_seed(self.seed, n, "group") % self.noise.bands == group]
        wanted = self.config.wanted(len(self.names))
        count = min(len(self.names), max(self.least_releases, devices_to_ask(wanted, self.over_sampling)))
        rng = np.random.Generator(np.random.Philox(key=derive_seed(self.seed, server_round, "sample")))
        return sorted(self.names[i] for i in rng.choice(len(self.names), size=count, replace=False))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._sent = arrays
        return self.messages(self.sampled(server_round), server_round, server_round - 1, arrays, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.messages(self.sampled(server_round), server_round, server_round, arrays, MessageType.EVALUATE)

    def messages(
        self,
        names: Iterable[str],
        number: int,
        version: int,
        arrays: ArrayRecord,
        kind: str,
        secure: Mapping[str, Told] | None = None,
    ) -> list[Message]:
        """One for each device: the plan of round `number` on a version of the shared adapter.

        And `secure`, what a device is told at a step of secure aggregation, if this is one.
        """
        plan = ConfigRecord({"round": number, "version": version, "head": ""})
        same = RecordDict({"arrays": arrays, "plan": plan})  # for all whose head is not known
        heads = self.ledger_heads if kind == MessageType.TRAIN else {}
        contents = ((name, _with_head(same, heads[name]) if name in heads else same) for name in names)
        if secure is not None:
            contents = ((name, _with_step(content, secure[name])) for name, content in contents)
        return [_message(content, self.nodes[name], kind) for name, content in contents]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the releases of a round make of the shared adapter; refuses and counts whatever is not one."""
        collector = self.collector(server_round, self._sent)
        collector.ask(self.sampled(server_round), version=server_round - 1)
        for reply in replies:
            collector.take(reply)
        return self.applied(server_round, self._sent, collector), None

    def collector(self, number: int, arrays: ArrayRecord) -> ReleaseCollector:
        """One for the releases of a round that begins with these arrays."""
        before = self.whole.join(to_numpy(arrays))[: self.schema.width]  # (P,)
        protects_sum = self.noise.on_sum > 0  # and nothing else that the releases could become
        collector = ReleaseCollector(
            self.config, self.schema, number, before, self.devices, self.limits, multiplies=not protects_sum
        )
        self.facts[number] = collector.facts
        return collector

    def applied(
        self, number: int, arrays: ArrayRecord, collector: ReleaseCollector, over: int = 0
    ) -> ArrayRecord | None:
        """The arrays after a round, where there was a release; the sum is taken by `over`, if given."""
        facts, rule, places = collector.close(), collector.rule, self.schema.places(number)
        self.ledger_heads |= collector.ledger_heads
        if not rule.count:
            if not facts.silent and set(facts.refused) - {NO_RELEASE}:
                raise NoReleaseError(f"round {number}: no device sent a release: {facts.refused}")
            return None
        if rule.count < self.least_releases:  # a krum or a trimmed mean of them would be none
            facts.refused[TOO_FEW] = rule.count
            return None
        noise = np.zeros(places.size)
        noise[places] = self.noise.drawn(number, int(places.sum()))
        by = over or (collector.asked if self.noise.on_sum else 0)
        change = rule.change(noise, by)[places]
        divisors = np.broadcast_to(by or rule.senders, places.shape)
        noise_std = self.noise.of_mean(collector.weight_squares[places], divisors[places])
        row = self._stepped(number, collector.before, change, noise_std)
        if collector.products and self.config.products != "average":
            return self._with_weights(row, arrays, collector.before, collector.products)
        return to_arrays(self.schema.split(row))

    def _stepped(self, number: int, before: Numbers, change: Numbers, noise_std: float) -> Numbers:
        """The shared adapter's row (P,) after the change of what travels, which is noted, by the optimizer."""
        facts, places = self.facts[number], self.schema.places(number)
        facts.change_norm_l2 = float(np.linalg.norm(change))
        facts.signal_to_noise = signal_to_noise(facts.change_norm_l2, noise_std, change.size)
        facts.signal_to_noise_floor = signal_to_noise_floor(change.size)
        row, self.moments = step_at(self.optimizer, before, change, self.moments, places)
        return row

    def _with_weights(
        self, row: Numbers, received: ArrayRecord, before: Numbers, products: MeanOfProducts
    ) -> ArrayRecord:
        """The row, and what is added to the frozen weights beside it (`server.lora_products`).

        Of stacked products all is in the weights: the adapter itself is as it was before the first round.
        """
        stacked = self.config.products == "stack"
        arrays, weights = self.schema.split(before if stacked else row), to_numpy(received)
        for layer, more in products.products() if stacked else products.residuals():
            name = f"{layer}.weight"
            arrays[name] = (weights[name] + self.config.learning_rate * more).astype(np.float32)
        return to_arrays(arrays)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Devices send no metrics; those that could not adopt are counted."""
        for reply in replies:
            if "adopted" not in _header(reply):
                self.facts[server_round].failed_adoptions += 1
        return None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Rounds `first_round` to `num_rounds`; `evaluate_fn` is called before the first and after each."""
        self.greet(grid)
        arrays, empty = initial_arrays, ConfigRecord()
        if evaluate_fn and self.first_round == 1:
            evaluate_fn(0, arrays)
        for number in range(self.first_round, num_rounds + 1):
            arrays = self._aggregated(number, arrays, grid, timeout)
            asked = self.configure_evaluate(number, arrays, empty, grid)
            self.aggregate_evaluate(number, grid.send_and_receive(asked, timeout=timeout))
            if evaluate_fn:
                evaluate_fn(number, arrays)
        if self.sums and self.first_round == 1 and not any(facts.releases for facts in self.facts.values()):
            raise NoReleaseError(f"no round came to a sum of {self.sums.limits.survivors:,} devices or more")
        return Result(arrays=arrays)

    def _aggregated(self, number: int, arrays: ArrayRecord, grid: Grid, timeout: float) -> ArrayRecord:
        """The shared adapter after a round's releases: made, and stored; or the one that was stored."""
        done = self.committed
        if done and done.round == number:
            self.ledger_heads, self.moments = dict(done.ledger_heads), done.moments
            self.facts[number] = done.facts
            return done.shared
        arrays = self.collected(number, arrays, grid, timeout) or arrays
        if self.commit:
            self.commit(Aggregate(number, arrays, self.ledger_heads, self.moments, self.facts[number]))
        return arrays

    def collected(self, number: int, arrays: ArrayRecord, grid: Grid, timeout: float) -> ArrayRecord | None:
        """Asks a round's devices and aggregates what they send, as it comes."""
        if self.sums:
            return self._summed(number, arrays, grid, timeout, self.sums)
        replies = grid.send_and_receive(self.configure_train(number, arrays, ConfigRecord(), grid), timeout=timeout)
        return self.aggregate_train(number, replies)[0]

    def _summed(
        self, number: int, arrays: ArrayRecord, grid: Grid, timeout: float, terms: SumTerms
    ) -> ArrayRecord | None:
        """The arrays after a round of secure aggregation: the mean change of those who came through, if they did."""
        names, facts = self.sampled(number), RoundFacts()
        self.facts[number] = facts
        round_ = SecureRound(terms, number, self.devices, self, grid, timeout, facts)
        summed = round_.play(names, arrays)
        if summed is None:
            if not facts.silent and set(facts.refused) - {NO_RELEASE}:
                raise NoReleaseError(f"round {number}: no sum of the devices' releases: {facts.refused}")
            return None
        self.ledger_heads |= summed.heads
        before = self.whole.join(to_numpy(arrays))  # (P,)
        change = (summed.row / facts.releases).astype(np.float32)
        return to_arrays(self.schema.split(self._stepped(number, before, change, self.noise.of_mean(facts.releases))))


def _message(content: RecordDict, node: int, kind: str) -> Message:
    return Message(content, dst_node_id=node, message_type=kind)


def _header(reply: Message) -> ConfigRecord:
    """What a reply says beside its arrays; nothing where it has no such record, as one that was made by hand may not.

    Not by `config_records`, which checks all records anew each time.
    """
    header = None if reply.has_error() else reply.content.get("header")
    return header if isinstance(header, ConfigRecord) else ConfigRecord()


def _with_head(content: RecordDict, head: str) -> RecordDict:
    plan = ConfigRecord({**content.config_records["plan"], "head": head})
    return RecordDict({"arrays": content.array_records["arrays"], "plan": plan})


def _with_step(content: RecordDict, told: Told) -> RecordDict:
    """With what a device is told at a step of secure aggregation."""
    return RecordDict({**content, RECORD: ConfigRecord(dict(told))})
