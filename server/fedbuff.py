"""FedBuff: a new version of the shared adapter for every so many releases, whenever they come (Nguyen et al. 2022).

A release that was made on a version τ versions ago counts 1 / √(1 + τ) of a fresh one (arXiv 2106.06639, their
staleness scaling). The sum is divided by the buffer's size, as in their Algorithm 1, and not by the weights: a stale
buffer makes a smaller step, and no release moves the shared adapter by more than a fresh one could. Kept is a running
sum, nothing of a release. Not covered: a largest staleness; who is asked when, which a simulated clock decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from flwr.app import ArrayRecord, MessageType
from flwr.serverapp import Grid

from florilegium.privacy.noise import ReleaseNoise
from florilegium.privacy.release import Schema
from florilegium.server.config import ServerConfig
from florilegium.server.release_collector import Limits
from florilegium.server.strategy import NO_LIMITS, Commit, ReleaseStrategy

Makers = Callable[[int], Mapping[str, int]]  # of version n: the devices that worked for it → what they began from


class BufferedStrategy(ReleaseStrategy):
    """Round n is what leads from version n − 1 to version n."""

    def __init__(
        self,
        config: ServerConfig,
        schema: Schema,
        seed: int,
        noise: ReleaseNoise,
        *,
        makers: Makers,
        version: Callable[[int], ArrayRecord],
        limits: Limits = NO_LIMITS,
        commit: Commit | None = None,
    ) -> None:
        """As `ReleaseStrategy`; `version` gives what devices were sent as an earlier version of the shared adapter."""
        super().__init__(config, schema, seed, noise, limits=limits, commit=commit)
        self.makers, self.version = makers, version

    def sampled(self, server_round: int) -> list[str]:
        return sorted(self.makers(server_round))

    def collected(self, number: int, arrays: ArrayRecord, grid: Grid, timeout: float) -> ArrayRecord | None:
        """Takes the releases of a version, those that began from the same one together."""
        collector, began = self.collector(number, arrays), self.makers(number)
        for version in sorted(set(began.values())):
            names: Sequence[str] = sorted(name for name, v in began.items() if v == version)
            collector.ask(names, version, weight(number - 1 - version))
            sent = arrays if version == number - 1 else self.version(version)
            messages = self.messages(names, number, version, sent, MessageType.TRAIN)
            for reply in grid.send_and_receive(messages, timeout=timeout):
                collector.take(reply)
        return self.applied(number, arrays, collector, over=self.config.buffer)


def weight(staleness: int) -> float:
    """1 / √(1 + τ). Raises `ValueError` for a version that is still to come."""
    if staleness < 0:
        raise ValueError(f"staleness = {staleness} must be at least 0: a release cannot be of a version to come")
    return 1 / math.sqrt(1 + staleness)
