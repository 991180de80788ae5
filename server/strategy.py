"""FedAvg over releases (McMahan et al. 2017), as a Flower strategy.

Differs from Flower's own FedAvg: all releases weigh the same, because a true number of examples never leaves a
device; devices are sampled by our own generator over our own names; a run can begin at a later round; the
aggregated adapter goes back at once, so that personal adapters learn on the version they will be used with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from privacy.gate import FAILED, NO_RELEASE
from privacy.noise import ReleaseNoise
from privacy.release import PROTOCOL, ReleaseRefusedError, Schema
from privacy.release import Array as Numbers
from privacy.seeds import derive_seed
from server.aggregate import FixedPointMean
from server.config import ServerConfig

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


class NoReleaseError(RuntimeError):
    """A round ended without a single release."""


@dataclass
class RoundFacts:
    """What the server knows about a round: public values and what it computed from releases."""

    releases: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # error code → devices
    change_norm_l2: float = 0.0
    signal_to_noise: float = math.nan


@dataclass(frozen=True)
class Aggregate:
    """What a round came to, before any device has it. Made twice, of other releases, it would show its noise."""

    round: int
    shared: ArrayRecord
    heads: Mapping[str, str]
    facts: RoundFacts


Commit = Callable[[Aggregate], None]


class FedAvgReleases(Strategy):
    """The mean of the releases, applied with the server's learning rate."""

    def __init__(
        self,
        config: ServerConfig,
        schema: Schema,
        seed: int,
        noise: ReleaseNoise,
        first_round: int = 1,
        commit: Commit | None = None,
        committed: Aggregate | None = None,
    ) -> None:
        """`noise` says what devices have added, a public value, and what is added here where they trust the server.

        `commit` stores an aggregate before any device gets it; `committed` is the one of a round that was not ended.
        """
        self.config, self.schema, self.seed, self.noise, self.first_round = config, schema, seed, noise, first_round
        self.commit, self.committed = commit, committed
        self.nodes: dict[str, int] = {}  # device → Flower's node id
        self.heads: dict[str, str] = {}  # device → head of its ledger with its last release
        self.arrays = ArrayRecord()
        self.facts: dict[int, RoundFacts] = {}

    def summary(self) -> None:
        """Nothing to say: the simulation prints its own."""

    def greet(self, grid: Grid) -> None:
        """Learns which device is behind each node; node ids are random, names are not."""
        if self.nodes:
            return
        asked = [_message(ArrayRecord(), ConfigRecord(), node, MessageType.QUERY) for node in grid.get_node_ids()]
        for reply in grid.send_and_receive(asked, timeout=self.config.reply_timeout_s):
            if not reply.has_error() and "device" in (header := reply.content.config_records["header"]):
                self.nodes[str(header["device"])] = reply.metadata.src_node_id
        if not self.nodes:
            raise NoReleaseError("no device answered the server's greeting")

    def device_at(self, node: int) -> str:
        return next(device for device, known in self.nodes.items() if known == node)

    def sampled(self, server_round: int) -> list[str]:
        """The devices of a round, by name, from the experiment's seed.

        With correlated noise a device is asked every `bands` rounds: each is in one of so many groups.
        """
        names = sorted(self.nodes)
        if self.noise.bands > 1:
            group = server_round % self.noise.bands
            return [n for n in names if derive_seed(self.seed, n, "group") % self.noise.bands == group]
        count = max(1, round(self.config.sampled_share * len(names)))
        rng = np.random.Generator(np.random.Philox(key=derive_seed(self.seed, server_round, "sample")))
        return sorted(rng.choice(names, size=count, replace=False).tolist())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.arrays = arrays
        return self._messages(server_round, server_round - 1, arrays, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._messages(server_round, server_round, arrays, MessageType.EVALUATE)

    def _messages(self, server_round: int, version: int, arrays: ArrayRecord, kind: str) -> list[Message]:
        return [
            _message(
                arrays,
                ConfigRecord({"round": server_round, "version": version, "head": self.heads.get(name, "")}),
                self.nodes[name],
                kind,
            )
            for name in self.sampled(server_round)
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Adds the mean of the releases; refuses and counts whatever is not one."""
        before = self.schema.join(to_numpy(self.arrays))  # (P,)
        schema, places = self.schema.of_round(server_round), self.schema.places(server_round)
        facts = self.facts[server_round] = RoundFacts()
        mean = FixedPointMean(int(places.sum()))
        for reply in replies:
            problem = self._take(reply, server_round - 1, schema, mean)
            if problem:
                facts.refused[problem] = facts.refused.get(problem, 0) + 1
        facts.releases = mean.count
        asked = len(self.sampled(server_round))
        if not mean.count:
            if not set(facts.refused) <= {NO_RELEASE}:
                raise NoReleaseError(f"round {server_round}: no device sent a release: {facts.refused}")
            return None, None
        change = mean.mean(self.noise.drawn(server_round, mean.total.size), asked if self.noise.on_sum else mean.count)
        facts.change_norm_l2 = float(np.linalg.norm(change))
        facts.signal_to_noise = signal_to_noise(facts.change_norm_l2, self.noise.of_mean(mean.count), change.size)
        before[places] += np.float32(self.config.learning_rate) * change
        return to_arrays(self.schema.split(before)), None

    def _take(self, reply: Message, version: int, schema: Schema, mean: FixedPointMean) -> str:
        """Adds one reply to the mean; the code of what was wrong with it, empty if nothing."""
        if reply.has_error():
            return FAILED
        header = reply.content.config_records["header"]
        if "error" in header:
            return str(header["error"])
        if header["protocol"] != PROTOCOL or header["version"] != version:
            return "wrong-version"
        try:
            mean.add(schema.join(to_numpy(reply.content.array_records["arrays"])))
        except (ReleaseRefusedError, ValueError):
            return "malformed"
        self.heads[self.device_at(reply.metadata.src_node_id)] = str(header["head"])
        return ""

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Devices send no metrics."""
        list(replies)
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
            self.aggregate_evaluate(
                number, grid.send_and_receive(self.configure_evaluate(number, arrays, empty, grid), timeout=timeout)
            )
            if evaluate_fn:
                evaluate_fn(number, arrays)
        return Result(arrays=arrays)

    def _aggregated(self, number: int, arrays: ArrayRecord, grid: Grid, timeout: float) -> ArrayRecord:
        """The shared adapter after a round's releases: made, and stored; or the one that was stored."""
        done = self.committed
        if done and done.round == number:
            self.heads, self.facts[number] = dict(done.heads), done.facts
            return done.shared
        replies = grid.send_and_receive(self.configure_train(number, arrays, ConfigRecord(), grid), timeout=timeout)
        arrays = self.aggregate_train(number, replies)[0] or arrays
        if self.commit:
            self.commit(Aggregate(number, arrays, self.heads, self.facts[number]))
        return arrays


def signal_to_noise(change_norm_l2: float, noise_std: float, width: int) -> float:
    """‖signal‖ / ‖noise‖ of a mean release whose numbers carry noise of `noise_std`, from public values.

    The noise has norm √P · noise_std in expectation; the signal is what the measured norm exceeds it by, in squares,
    and never below zero. NaN when no noise was added.
    """
    noise = noise_std * math.sqrt(width)
    return math.sqrt(max(0.0, change_norm_l2**2 - noise**2)) / noise if noise else math.nan


def _message(arrays: ArrayRecord, plan: ConfigRecord, node: int, kind: str) -> Message:
    return Message(RecordDict({"arrays": arrays, "plan": plan}), dst_node_id=node, message_type=kind)


def to_numpy(arrays: ArrayRecord) -> dict[str, Numbers]:
    return {name: array.numpy() for name, array in arrays.items()}


def to_arrays(numbers: dict[str, Numbers]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in numbers.items()})
