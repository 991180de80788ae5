"""The mean of releases, summed in 64-bit fixed point so that the order of arrival never changes a bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from privacy.release import Array

Numbers = npt.NDArray[np.float64]

SCALE = 2.0**40  # one unit is about 1e-12; room for |Σ| < 2²³


class FixedPointMean:
    """A running mean of float32 rows (P,). Memory does not grow with the number of rows."""

    def __init__(self, width: int) -> None:
        self.total = np.zeros(width, dtype=np.int64)
        self.count = 0

    def add(self, row: Array) -> None:
        """Raises ValueError for a number that is not finite or too large for fixed point (2²² / row)."""
        if not np.isfinite(row).all() or np.abs(row).max(initial=0.0) >= 2.0**22:
            raise ValueError("a release holds a number that is not finite or not below 2^22")
        units = np.rint(row.astype(np.float64) * SCALE).astype(np.int64)
        room = np.iinfo(np.int64).max - np.abs(self.total)
        if (np.abs(units) > room).any():
            raise ValueError("the sum of the releases does not fit into 64-bit fixed point")
        self.total += units
        self.count += 1

    def mean(self, noise: Numbers | float = 0.0, over: int = 0) -> Array:
        """The sum and `noise` (P,) by `over`, or by the number of rows; zero when nothing was added."""
        return ((self.total / SCALE + noise) / max(1, over or self.count)).astype(np.float32)
