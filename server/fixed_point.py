"""A sum of releases in 64-bit fixed point, so that the order of arrival never changes a bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from florilegium.privacy.common.errors import FlorilegiumError
from florilegium.privacy.release import Array

Numbers = npt.NDArray[np.float64]

SCALE = 2.0**40  # one unit is about 1e-12; room for |Σ| < 2²³


class BadReleaseError(FlorilegiumError):
    """A release whose numbers cannot be aggregated, or one too many."""


class FixedPointSum:
    """A running sum of float32 rows (P,). Memory does not grow with the number of rows."""

    def __init__(self, width: int) -> None:
        self.units = np.zeros(width, dtype=np.int64)
        self.count = 0
        self.bound = 0.0  # on every number of the sum, in units

    def add(self, row: Array) -> None:
        """Raises `BadReleaseError` for a number that is not finite or too large for fixed point (2²² / row)."""
        largest = float(np.abs(row).max(initial=0.0))
        if not largest < 2.0**22:  # nor NaN
            raise BadReleaseError("a release holds a number that is not finite or not below 2^22")
        bound = self.bound + largest * SCALE + 1
        if bound >= 2.0**63:
            bound = float(np.abs(self.units).max()) + largest * SCALE + 1
            if bound >= 2.0**63:
                raise BadReleaseError("the sum of the releases does not fit into 64-bit fixed point")
        self.units += np.rint(row * SCALE, dtype=np.float64).astype(np.int64)
        self.count, self.bound = self.count + 1, bound

    @property
    def numbers(self) -> Numbers:
        """The sum (P,)."""
        return self.units / SCALE
