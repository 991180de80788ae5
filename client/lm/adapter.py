"""LoRA adapters of many devices as rows of one matrix (Hu et al. 2021, arXiv 2106.09685).

An adapter adds `scale · B A x` to the output of a linear layer, with `A: (r, in)`, `B: (out, r)` and
`scale = alpha / r`. All factors of one device lie behind each other in a row of P numbers; K devices are a
tensor (K, P). With `factors = "b"` only B is in the row: A is frozen and the same for all, drawn from a public
seed (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313). Not covered: DoRA, embeddings, dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field

from privacy.config import Config

Factors = Literal["both", "b"]


class AdapterConfig(Config):
    """The shape of a LoRA adapter."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] = Field((), description="endings of the adapted linear layers' names; empty: all")
    factors: Factors = "both"


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """The name and the size of a linear layer that an adapter changes."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class AdapterLayout:
    """Where the factors of each layer lie in a row, and the frozen ones that are in no row."""

    layers: tuple[AdaptedLayer, ...]
    rank: int
    alpha: float
    factors: Factors
    frozen_a: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)  # (r, in) by layer

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def sizes(self) -> list[int]:
        """Lengths of the factors in a row, layer by layer: A then B, or B alone."""
        sizes: list[int] = []
        for layer in self.layers:
            if self.factors == "both":
                sizes.append(self.rank * layer.in_features)
            sizes.append(layer.out_features * self.rank)
        return sizes

    @property
    def width(self) -> int:
        """P, the number of trained parameters of one device."""
        return sum(self.sizes)

    def split(self, rows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, A and B of each layer as views of rows (R, P): A (R, r, in) or frozen (r, in), B (R, out, r)."""
        parts = iter(torch.split(rows, self.sizes, dim=1))
        for layer in self.layers:
            if self.factors == "both":
                a = next(parts).view(-1, self.rank, layer.in_features)
            else:
                a = self.frozen_a[layer.name]
            yield layer.name, a, next(parts).view(-1, layer.out_features, self.rank)

    def start(self, seed: int) -> torch.Tensor:
        """A new device's row (P,): A uniform in ±1/√in as PEFT draws it, B zero, so that nothing changes yet."""
        generator = torch.Generator().manual_seed(seed)
        row = torch.zeros(self.width)
        if self.factors == "both":
            for (_, a, _), layer in zip(self.split(row[None]), self.layers, strict=True):
                a[0].copy_(_uniform_a(self.rank, layer.in_features, generator))
        return row


def layout(layers: tuple[AdaptedLayer, ...], config: AdapterConfig, public_seed: int = 0) -> AdapterLayout:
    """The layout of `config` over `layers`; the frozen factors, if any, follow from `public_seed`."""
    frozen: dict[str, torch.Tensor] = {}
    if config.factors == "b":
        generator = torch.Generator().manual_seed(public_seed)
        frozen = {x.name: _uniform_a(config.rank, x.in_features, generator) for x in layers}
    return AdapterLayout(layers, config.rank, config.alpha, config.factors, frozen)


@dataclass(frozen=True)
class Adapters:
    """Rows of one layout. One row alone serves every device of a batch."""

    layout: AdapterLayout
    rows: torch.Tensor  # (K, P) or (1, P)

    def pick(self, slots: torch.Tensor) -> Adapters:
        """The rows of the batch: row i belongs to device `slots[i]`."""
        return self if self.rows.shape[0] == 1 else Adapters(self.layout, self.rows.index_select(0, slots))


def _uniform_a(rank: int, in_features: int, generator: torch.Generator) -> torch.Tensor:
    bound = 1 / math.sqrt(in_features)
    return torch.rand(rank, in_features, generator=generator) * (2 * bound) - bound
