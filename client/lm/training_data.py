"""What devices train on, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.packing import Example


@dataclass(frozen=True)
class TrainingSet:
    """What one device trains on: its examples and the batches, as indices, in their order.

    `weights[i]` are those of example i's targets in the mean over a batch; none: all weigh the same.
    """

    examples: Sequence[Example]
    batches: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]] = ()

    def weights_of(self, batch: Sequence[int]) -> list[Sequence[float]]:
        """Of each example of a batch, those of its targets."""
        return [self.weights[i] if self.weights else [1.0] * self.examples[i].targets for i in batch]

    @property
    def tokens(self) -> int:
        """Of the longest batch."""
        return max((sum(self.examples[i].length for i in batch) for batch in self.batches), default=0)


@dataclass(frozen=True)
class TrainingResult:
    """What came of the lessons."""

    adapters: Adapters
    losses: list[list[float]]  # of each device and step, nats per token
    failed: dict[int, str] = field(default_factory=dict)  # devices that are as they were before, and why


def objection(losses: Sequence[float], sound: bool) -> str:
    """Why a device's training does not count; empty when it does."""
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            return f"the loss of step {step} is {loss}"
    return "" if sound else "the adapter is not finite"
