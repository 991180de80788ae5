"""What every arm of a benchmark does: the same adapters, the same examples, the same steps.

Texts are random ids of random lengths, since the time does not depend on what they say; a run needs no data set.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn

from florilegium.client.lm.adapter import AdaptedLayer, AdapterLayout, layout
from florilegium.client.lm.packing import Example

LENGTHS = (24, 64)  # tokens of an example, uniform; half of them are the reply
RANK, ALPHA = 8, 16.0  # PEFT's usual adapter, on every linear layer but the head
LEARNING_RATE = 1e-3
NEW_TOKENS = 32
NODES = 256  # of Flower's simulation
CLIP_NORM_L2, NOISE_MULTIPLIER = 1.0, 1.0


@dataclass(frozen=True)
class Workload:
    """One measurement: so many devices, each with so many examples in every step."""

    kind: str  # one of `arguments.KINDS`
    devices: int
    examples_per_step: int
    local_steps: int
    first: int = 0  # of the devices, whose numbers follow

    def shares(self, count: int) -> list[Workload]:
        """The devices in so many parts of nearly one size, or in as many as there are devices."""
        ends = [self.devices * part // count for part in range(count + 1)]
        parts = [(begin, end) for begin, end in pairwise(ends) if end > begin]
        return [replace(self, devices=end - begin, first=self.first + begin) for begin, end in parts]

    @property
    def steps(self) -> int:
        return self.local_steps if "training" in self.kind else 1

    def batches(self, device: int) -> list[list[Example]]:
        """The examples of each step of a device; the same for every arm."""
        rng = random.Random(self.first + device)
        return [[_example(rng, self.kind) for _ in range(self.examples_per_step)] for _ in range(self.steps)]

    @property
    def examples(self) -> list[Example]:
        """Of all devices and steps."""
        return [e for k in range(self.devices) for batch in self.batches(k) for e in batch]

    @property
    def tokens(self) -> int:
        """Tokens read, and written where the kind is generation."""
        written = NEW_TOKENS if self.kind == "generation" else 0
        return sum(e.length + written for e in self.examples)

    def flops(self, size: ModelSize) -> float:
        """Of the products with weights and adapters, for all devices; what is only padding does not count."""
        examples = self.examples
        read, targets = sum(e.length for e in examples), sum(e.targets for e in examples)
        if self.kind == "embedding":
            return 2.0 * read * size.linear
        if self.kind == "generation":
            written = len(examples) * NEW_TOKENS
            return 2.0 * ((read + written) * (size.linear + size.adapter) + written * size.head)
        return 4.0 * (read * size.linear + targets * size.head) + 6.0 * read * size.adapter  # no weight gradients


@dataclass(frozen=True)
class ModelSize:
    """Numbers in the linear layers, in the head, and in one adapter."""

    linear: int
    head: int
    adapter: int

    @classmethod
    def of(cls, head: nn.Linear, adapters: AdapterLayout) -> ModelSize:
        """Of a model whose every linear layer but the head has an adapter."""
        linear = sum(x.in_features * x.out_features for x in adapters.layers)
        return cls(linear, head.weight.numel(), adapters.width)


class Arm(Protocol):
    """One way to do the work."""

    size: ModelSize

    def prepare(self, work: Workload) -> Callable[[], list[Any]]:
        """What is to be timed; it returns one result a device: its last loss, an embedding's sum, or token ids."""


def _example(rng: random.Random, kind: str) -> Example:
    ids = tuple(rng.randrange(8, 4000) for _ in range(rng.randint(*LENGTHS)))
    half = len(ids) // 2 if "training" in kind else len(ids)
    return Example(ids[:half], ids[half:], (0, half), False)


def adapter_layout(layers: tuple[AdaptedLayer, ...]) -> AdapterLayout:
    return layout(layers, RANK, ALPHA)


def adapter_rows(adapters: AdapterLayout, devices: int, first: int = 0) -> torch.Tensor:
    """An adapter for each device (K, P), with B no longer zero so that every factor has a gradient."""
    rows = torch.empty(devices, adapters.width)
    for k in range(devices):
        rows[k].uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(first + k))
    return rows
