"""(IA)³ adapters of many devices as rows of one matrix (Liu et al. 2022, arXiv 2205.05638).

A vector multiplies what a layer puts out (keys and values) or what it is given (the second layer of a feed-forward
block), number by number; all vectors of one device lie behind each other in a row of P numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ScaledLayer:
    """A linear layer whose output, or input, is multiplied by a vector of `size` numbers."""

    name: str
    size: int
    on_input: bool


@dataclass(frozen=True)
class ScalingLayout:
    """Where the vector of each layer lies in a row."""

    layers: tuple[ScaledLayer, ...]

    @property
    def width(self) -> int:
        """P, the number of trained parameters of one device."""
        return sum(layer.size for layer in self.layers)

    def start(self, seed: int) -> torch.Tensor:
        """A new device's row (P,): ones, which change nothing; the same for every seed."""
        return torch.ones(self.width)

    def split(self, rows: torch.Tensor) -> Iterator[tuple[ScaledLayer, torch.Tensor]]:
        """Each layer with its vectors (K, size), views of rows (K, P)."""
        return zip(self.layers, torch.split(rows, [layer.size for layer in self.layers], dim=1), strict=True)
