"""The noise that a server adds to a sum of clipped changes: independent by round, or correlated (DP-FTRL).

Correlated noise is z C⁻¹ with C lower triangular, Toeplitz and of `bands` diagonals: what one round's noise adds, later
ones partly take off again, so that the sum of all rounds' changes carries less of it (Kairouz et al. 2021, arXiv
2103.00039; banded: Choquette-Choo et al. 2023, arXiv 2306.08153). C's column is that of the square root of the
all-ones matrix, (1 − x)^(−1/2) (Fichtenberger et al. 2023, arXiv 2202.11205; jax-privacy's
`toeplitz.optimal_max_error_strategy_coefs`), cut off and scaled to length 1. Devices that take part
at least `bands` rounds apart then meet orthogonal columns: each participation costs what one Gaussian mechanism with
the noise multiplier σ costs. Not covered: amplification by sampling, streams of more than one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from florilegium.privacy.seeds import derive_key


@dataclass(frozen=True)
class ReleaseNoise:
    """Standard deviations of each number: `on_device` in one release, `on_sum` in the server's sum of a round."""

    on_device: float = 0.0
    on_sum: float = 0.0
    bands: int = 1
    secret: int = 0

    def of_mean(
        self, weight_squares: npt.NDArray[np.float64] | float, over: npt.NDArray[np.float64] | float | None = None
    ) -> float:
        """That of Σ w_k x_k / over, from Σ w_k²; where numbers differ in either, (P,), the root of the mean square.

        Of a plain mean both are the number of releases.
        """
        by = np.maximum(1, weight_squares if over is None else over)
        variance = (weight_squares * self.on_device**2 + self.on_sum**2) / by**2
        return float(np.sqrt(np.mean(variance)))

    def drawn(self, round_number: int, width: int) -> npt.NDArray[np.float64]:
        """What is added to the sum of round 1, 2, …: (P,) float64, the same again for the same round."""
        total = np.zeros(width)
        if self.on_sum:
            for back, weight in enumerate(inverse_column(self.bands, round_number)):
                total += weight * self._independent(round_number - back, width)
        return self.on_sum * total

    def _independent(self, round_number: int, width: int) -> npt.NDArray[np.float64]:
        key = derive_key(self.secret, round_number, "central-noise")
        return np.random.Generator(np.random.Philox(key=key)).standard_normal(width)


def column(bands: int) -> npt.NDArray[np.float64]:
    """The first column (bands,) of C: binom(2k, k) / 4^k, scaled to length 1."""
    weights = np.cumprod(np.concatenate([[1.0], (2 * np.arange(1, bands) - 1) / (2 * np.arange(1, bands))]))
    scaled: npt.NDArray[np.float64] = weights / np.linalg.norm(weights)
    return scaled


def inverse_column(bands: int, rounds: int) -> npt.NDArray[np.float64]:
    """The first column (rounds,) of C⁻¹: the power series 1 / C(x)."""
    c, inverse = column(bands), np.zeros(rounds)
    for n in range(rounds):
        known = sum(c[k] * inverse[n - k] for k in range(1, min(bands, n + 1)))
        inverse[n] = ((n == 0) - known) / c[0]
    return inverse
