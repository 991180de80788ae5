"""Means of products of LoRA factors: how far the product of the means is off, and two ways to send what it should be.

Where devices train A (r, in) and B (out, r), the mean of their B_i A_i is not the product of mean B and mean A:

    1/k Σ B_i A_i = B̄ Ā + 1/k Σ (B_i − B̄)(A_i − Ā)

FedEx-LoRA (Singhal et al. 2024, arXiv 2410.09432) adds the second term, the residual, to the frozen weight. FLoRA
(Wang et al. 2024, arXiv 2409.05976) adds the mean of products itself, and devices begin anew from B = 0; it sends the
factors behind each other, as an adapter of rank k r, whose product is the same sum: here it is summed as it comes, so
that nothing of a release is kept, and sent as (out, in). That is smaller from k r > in · out / (in + out) devices on.

Rows (P,) are changes of a received row; what is multiplied is received + change. No product has LoRA's scale alpha / r:
who adds one to a weight multiplies by it. Noise of devices is multiplied too: the residual of noised releases holds
the mean of products of noises, without any of their signal. Not covered: one factor frozen (the residual is then
zero), ranks that differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from florilegium.privacy.release import Array, Schema
from florilegium.server.aggregation import TooFewReleasesError, check_row
from florilegium.server.fixed_point import SCALE, BadReleaseError, FixedPointSum, Numbers

Units = npt.NDArray[np.int64]

Factors = tuple[Array, Array]  # A (r, in) and B (out, r)


@dataclass(frozen=True)
class AveragingError:
    """‖mean of products − product of means‖_F / ‖mean of products‖_F, by layer and of all layers as one vector."""

    layers: Mapping[str, float]
    overall: float


class MeanOfProducts:
    """The mean of B_i A_i of each layer, and that of the rows, over any number of devices.

    Keeps 8 bytes for each number of the adapted weights and of a row, whatever the number of devices, and sums them
    in 64-bit fixed point, so that the order of arrival never changes a bit.
    """

    def __init__(self, schema: Schema, received: Array) -> None:
        """`received` (P,) is the shared row that all changes are relative to."""
        self.schema, self.received = schema, received
        self.changes = FixedPointSum(received.size)
        self.totals: dict[str, Units] = {}  # layer → (out, in)
        for name, (a, b) in self._factors(np.zeros_like(received)):
            self.totals[name] = np.zeros((len(b), a.shape[1]), dtype=np.int64)

    @property
    def count(self) -> int:
        return self.changes.count

    @property
    def held_bytes(self) -> int:
        return self.changes.units.nbytes + sum(total.nbytes for total in self.totals.values())

    def add(self, device: str, change: Array) -> None:
        """Takes a change (P,). Raises `BadReleaseError`, and is as it was, where it or a product is too large.

        Needs as much again as `held_bytes` while it runs.
        """
        check_row(change, self.received.size)
        units = {name: _units(_product(*pair), self.totals[name]) for name, pair in self._factors(change)}
        self.changes.add(change)
        for name, product in units.items():
            self.totals[name] += product

    def means(self) -> dict[str, Factors]:
        """Ā (r, in) and B̄ (out, r) of each layer: what plain averaging sends."""
        return dict(self._factors((self.changes.numbers / max(1, self.count)).astype(np.float32)))

    def products(self) -> Iterator[tuple[str, Numbers]]:
        """1/k Σ B_i A_i of each layer, (out, in). Raises `TooFewReleasesError` when nothing was added."""
        if not self.count:
            raise TooFewReleasesError("no release was added, so there is no mean of products")
        return ((name, total / SCALE / self.count) for name, total in self.totals.items())

    def residuals(self) -> Iterator[tuple[str, Numbers]]:
        """1/k Σ B_i A_i − B̄ Ā of each layer, (out, in): what FedEx-LoRA adds to the frozen weight, times its scale."""
        means = self.means()
        return ((name, product - _product(*means[name])) for name, product in self.products())

    def error(self) -> AveragingError:
        """That of plain averaging; 0 where both products are 0."""
        whole = {name: float(np.linalg.norm(product)) for name, product in self.products()}
        off = {name: float(np.linalg.norm(residual)) for name, residual in self.residuals()}
        layers = {name: _ratio(off[name], whole[name]) for name in whole}
        return AveragingError(layers, _ratio(math.hypot(*off.values()), math.hypot(*whole.values())))

    def _factors(self, change: Array) -> Iterator[tuple[str, Factors]]:
        return split_factors(self.schema, self.received + change)


def split_factors(schema: Schema, row: Array) -> Iterator[tuple[str, Factors]]:
    """Each layer's name, A (r, in) and B (out, r). Raises `BadReleaseError` where one of them, or a common r, lacks."""
    arrays = schema.split(row)
    layers = dict.fromkeys(name.removesuffix(".lora_A").removesuffix(".lora_B") for name in arrays)
    for layer in layers:
        a, b = arrays.get(f"{layer}.lora_A"), arrays.get(f"{layer}.lora_B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise BadReleaseError(f"{layer} has not A (r, in) and B (out, r) in a release; set factors to both")
        yield layer, (a, b)


def _product(a: Array, b: Array) -> Numbers:
    """B A, (out, in)."""
    return b.astype(np.float64) @ a.astype(np.float64)


def _units(product: Numbers, total: Units) -> Units:
    """A product (out, in) in fixed point; raises `BadReleaseError` unless `total` has room for it."""
    if not (np.abs(product) < 2.0**22).all():
        raise BadReleaseError("a product of factors holds a number that is not finite or not below 2^22")
    units = np.rint(product * SCALE).astype(np.int64)
    if (np.abs(units) > np.iinfo(np.int64).max - np.abs(total)).any():
        raise BadReleaseError("the sum of the products does not fit into 64-bit fixed point")
    return units


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)
