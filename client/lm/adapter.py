"""LoRA adapters of many devices as rows of one matrix (Hu et al. 2021, arXiv 2106.09685).

An adapter adds `scale · B A x` to the output of a linear layer, with `A: (r, in)`, `B: (out, r)` and
`scale = alpha / r`. All factors of one device lie behind each other in a row of P numbers; K devices are a
tensor (K, P). With `factors = "b"` only B is in the row: A is frozen and the same for all, drawn from a public
seed (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313); with "a" only A is, and B is the one that is drawn. With
"alternate" both are, and each release changes one of them in turn (RoLoRA, arXiv 2409.02346). A gated adapter has a
vector `w: (in,)` more for each layer, behind all factors: of a token x it makes the weight σ(w · x) of its own part,
and what is left of 1 is that of the other active adapters (the mixer of FedALT, arXiv 2503.11880). Not covered: DoRA,
embeddings, dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from florilegium.client.lm.config import Trained


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
    factors: Trained
    # A (r, in) or B (out, r) by layer, whichever is not trained
    frozen: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    gated: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def sizes(self) -> list[int]:
        """Lengths of the factors in a row, layer by layer: A then B, or one of them alone; then of the gates."""
        sizes: list[int] = []
        for layer in self.layers:
            sizes += [self.rank * layer.in_features] * self.trains_a + [layer.out_features * self.rank] * self.trains_b
        return sizes + [layer.in_features for layer in self.layers if self.gated]

    @property
    def trains_a(self) -> bool:
        return self.factors != "b"

    @property
    def trains_b(self) -> bool:
        return self.factors != "a"

    @property
    def width(self) -> int:
        """P, the number of trained parameters of one device."""
        return sum(self.sizes)

    def split(self, rows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, A and B of each layer as views of rows (R, P): (R, r, in) and (R, out, r), or without R if frozen."""
        parts = iter(torch.split(rows, self.sizes, dim=1))
        for layer in self.layers:
            a = next(parts).view(-1, self.rank, layer.in_features) if self.trains_a else self.frozen[layer.name]
            b = next(parts).view(-1, layer.out_features, self.rank) if self.trains_b else self.frozen[layer.name]
            yield layer.name, a, b

    def unstack(
        self, rows: torch.Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Of rows (K, P): name, A (K, r, in), Bᵀ (K, r, out) and gate (K, in, 1), if any, of each layer, in `dtype`.

        Differentiable; the factors are contiguous.
        """
        found = _Unstack.apply(rows, self, dtype)  # type: ignore[no-untyped-call]
        parts, count = iter(found), len(self.layers)
        gates = [gate[:, :, None] for gate in found[-count:]] if self.gated else [None] * count
        for layer, gate in zip(self.layers, gates, strict=True):
            a = next(parts) if self.trains_a else self._spread(layer.name, len(rows), dtype)
            b = next(parts) if self.trains_b else self._spread(layer.name, len(rows), dtype).mT.contiguous()
            yield layer.name, a, b, gate

    def _spread(self, layer: str, devices: int, dtype: torch.dtype) -> torch.Tensor:
        """The frozen factor of a layer, for so many devices."""
        return self.frozen[layer].to(dtype).expand(devices, -1, -1)

    def start(self, seed: int) -> torch.Tensor:
        """A new device's row (P,): A uniform in ±1/√in as PEFT draws it, B zero, so that nothing changes yet.

        Where one factor is trained alone, it is that one that is zero.
        """
        generator = torch.Generator().manual_seed(seed)
        row = torch.zeros(self.width)
        if self.trains_a and self.trains_b:
            for (_, a, _), layer in zip(self.split(row[None]), self.layers, strict=True):
                a[0].copy_(_uniform((self.rank, layer.in_features), layer.in_features, generator))
        return row


def layout(
    layers: tuple[AdaptedLayer, ...],
    rank: int = 8,
    alpha: float = 16.0,
    factors: Trained = "both",
    public_seed: int = 0,
) -> AdapterLayout:
    """The layout of adapters over `layers`; the frozen factors, if any, follow from `public_seed`."""
    generator, frozen = torch.Generator().manual_seed(public_seed), dict[str, torch.Tensor]()
    if factors == "b":
        frozen = {x.name: _uniform((rank, x.in_features), x.in_features, generator) for x in layers}
    elif factors == "a":
        frozen = {x.name: _uniform((x.out_features, rank), x.out_features, generator) for x in layers}
    return AdapterLayout(layers, rank, alpha, factors, frozen)


def weight_layout(layout: AdapterLayout) -> AdapterLayout:
    """An adapter whose B (out, in) is a change of the whole weight, with the same scale: its A is the identity."""
    rank = max(layer.in_features for layer in layout.layers)
    ones = {layer.name: torch.eye(rank, layer.in_features) for layer in layout.layers}
    return AdapterLayout(layout.layers, rank, layout.scale * rank, "b", ones)


class Layout(Protocol):
    """What the numbers of a device's row are: LoRA's factors, or those of another kind of adapter."""

    @property
    def width(self) -> int:
        """P, the number of trained parameters of one device."""

    def start(self, seed: int) -> torch.Tensor:
        """A new device's row (P,)."""


@dataclass(frozen=True)
class Adapters:
    """Rows of one layout. One row alone serves every device of a batch."""

    layout: Layout
    rows: torch.Tensor  # (K, P) or (1, P)

    def pick(self, devices: Sequence[int]) -> Adapters:
        """The rows of these devices; a single row stays what it is."""
        if len(self.rows) == 1:
            return self
        end = devices[0] + len(devices)
        if list(devices) != list(range(devices[0], end)):
            return Adapters(self.layout, self.rows[list(devices)])
        return self if len(devices) == len(self.rows) else Adapters(self.layout, self.rows[devices[0] : end])


class _Unstack(torch.autograd.Function):
    """Copies the trained factors out of the rows; the derivative is written straight into float32 rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layout: AdapterLayout, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        ctx.layout, ctx.shape = layout, rows.shape
        return tuple(part.to(dtype).contiguous() for part in _trained_parts(rows, layout))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gathered = torch.empty(ctx.shape, device=grads[0].device)
        for part, grad in zip(_trained_parts(gathered, ctx.layout), grads, strict=True):
            part.copy_(grad)
        return gathered, None, None


def _trained_parts(rows: torch.Tensor, layout: AdapterLayout) -> Iterator[torch.Tensor]:
    """Views of the rows: of each layer A (K, r, in) and Bᵀ (K, r, out), those that are trained; then gates (K, in)."""
    for _, a, b in layout.split(rows):
        if layout.trains_a:
            yield a
        if layout.trains_b:
            yield b.mT
    if layout.gated:
        yield from torch.split(rows, layout.sizes, dim=1)[-len(layout.layers) :]


def _uniform(shape: tuple[int, int], width: int, generator: torch.Generator) -> torch.Tensor:
    bound = 1 / math.sqrt(width)
    return torch.rand(shape, generator=generator) * (2 * bound) - bound
