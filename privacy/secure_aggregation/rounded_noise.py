"""Numbers as integers whose sum over devices carries Gaussian noise that nobody adds alone.

Each of n devices turns its row by a public rotation, adds its share N(0, s²) and rounds to whole units u. Each rounding
is made on a sum that has noise already, and that is what makes the accounting that of a Gaussian mechanism: with
x = Σ x_i / u, σ² = Σ (s_i / u)² and every share of at least `LEAST_SHARE` units,

    Σ round(x_i / u + N(0, (s_i / u)²))   is distributed as   round(x + N(0, σ²) + U_1 + … + U_{n−1}),

the U uniform on [−½, ½], but for a distance in total variation of `total_variation`: the right side is the Gaussian
mechanism on the sum of what devices have *before* they round, and then post-processing. Why: the probability that one
device says k is (φ * box)(k − x_i), so that by Poisson's summation its characteristic function is Σ_m q(θ + 2πm)
exp(i x_i (θ + 2πm)), q = exp(−s² ω² / 2) sinc(ω / 2); in the product over the devices the terms with the same m
everywhere are that of the right side, and all others are bounded in `aliasing`. So rounding needs no room in the
sensitivity, unlike discrete noise that is added after it (distributed discrete Gaussian, Kairouz et al. 2021, arXiv
2102.06387; Skellam, Agarwal et al. 2021, arXiv 2110.04995), and costs u² / 12 of variance a device.

What reduces modulo 2^b is post-processing as well; the unit is such that no honest sum wraps, but for `WRAPS`. Not
covered: that the generator's Gaussian is made of 53 bits; each share is rounded to units far above the last of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.fft import dct, idct

from florilegium.privacy.common.errors import UserError

Row = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

LEAST_SHARE = 4.0  # units of a device's share of the noise
LEAST_BITS, MOST_BITS = 8, 32  # of a number on its way
WRAPS = 1e-9  # chance that a number of a sum of honest devices wraps
TAIL = 100.0  # natural logarithms of what is left out at the ends of a distribution


class TooFewBitsError(UserError):
    """Numbers with so few bits cannot hold the sum of so many devices, and its noise; says how many can."""


@dataclass(frozen=True, slots=True)
class SumCode:
    """How the rows (P,) of up to `devices` devices become integers modulo 2^bits, and their sum a row again."""

    width: int
    devices: int
    bits: int
    unit: float
    share_std: float  # of the noise that one device adds to each number
    rotation: int  # public seed, of a round

    def encoded(self, row: Row, noise: Row) -> Integers:
        """(P,) int64: round((R x + s z) / u), of z (P,) from a standard normal that nobody else knows."""
        return np.rint((rotated(row, self.rotation) + self.share_std * noise) / self.unit).astype(np.int64)

    def decoded(self, total: Integers) -> Row:
        """The sum (P,) of rows and their noise, from the integers' sum modulo 2^bits."""
        half = 1 << (self.bits - 1)
        centred = ((total + half) & ((1 << self.bits) - 1)) - half
        return turned_back(np.multiply(centred, self.unit, dtype=np.float64), self.rotation)

    @property
    def size_bytes(self) -> int:
        """Of one row on its way."""
        return packed_bytes(self.width, self.bits)


def sum_code(width: int, devices: int, norm_l2: float, share_std: float, bits: int = 0, rotation: int = 0) -> SumCode:
    """The code with the finest unit that does not wrap, for rows no longer than `norm_l2`.

    `bits` = 0: the fewest with which a share is `LEAST_SHARE` units. Raises `TooFewBitsError` where it is less.
    """
    reach = largest_number(width, devices, norm_l2, share_std)
    needed = _bits_for(reach * LEAST_SHARE / share_std, devices) if share_std > 0 else LEAST_BITS + 8
    if not LEAST_BITS <= (bits or needed) <= MOST_BITS or (bits and bits < needed):
        raise TooFewBitsError(
            f"secure_aggregation.bits = {bits} cannot hold the sum of {devices:,} devices with shares of noise of "
            f"{LEAST_SHARE:g} units: that takes {needed} of at most {MOST_BITS} bits"
            + (f"; set it to {needed}, or 0" if needed <= MOST_BITS else "; clip to a smaller norm, or ask fewer")
        )
    room = (1 << (bits or needed) - 1) - devices / 2 - 1
    return SumCode(width, devices, bits or needed, reach / room, share_std, rotation)


def largest_number(width: int, devices: int, norm_l2: float, share_std: float) -> float:
    """What no number of the rotated sum exceeds, but for a chance of `WRAPS` for all of them together.

    A number of R v is Σ_j c_j ε_j v_j with |c_j| ≤ √(2 / P), so beyond t with chance 2 exp(−t² P / (4 ‖v‖²))
    (Hoeffding 1963), and ‖v‖ is at most n times a row's norm; the noise is beyond t with 2 exp(−t² / (2 n s²)).
    """
    often = math.log(4 * width / WRAPS)
    signal = devices * norm_l2 * min(1.0, 2 * math.sqrt(often / width))
    return signal + share_std * math.sqrt(2 * devices * often)


def _bits_for(reach_units: float, devices: int) -> int:
    return max(LEAST_BITS, math.ceil(math.log2(reach_units + devices / 2 + 1)) + 1)


def aliasing(devices: int, share_units: float) -> float:
    """Bound on the distance of the two characteristic functions, for at least three shares of at least two units.

    Σ over the tuples (m_1 … m_n) that are not constant of Π exp(−s² (2πm_i + θ)² / 2), |θ| ≤ π, is at most
    n B (A + B)^(n−1) with A = exp(−s² θ² / 2), B = Σ_{m≠0}. Where |θ| ≤ π/2, B ≤ 3 exp(−9π² s² / 8) and A ≤ 1; beyond,
    B ≤ 3 exp(−π² s² / 2), and both B and A are at most exp(−π² s² / 8), so that (A + B)^(n−1) ≤ 4 exp(−π² s² / 4).
    """
    if devices < 3 or share_units < 2:
        raise ValueError(f"{devices} shares of {share_units} units: the bound is for three of two units at least")
    square = (math.pi * share_units) ** 2
    near = 3 * math.exp(-9 / 8 * square)
    return max(devices * near * math.exp(devices * near), 12 * devices * math.exp(-3 / 4 * square))


def total_variation(width: int, devices: int, share_units: float) -> float:
    """Of what devices' rounded shares make of a sum of `width` numbers, to the Gaussian mechanism's: added to δ.

    Each probability is off by at most `aliasing` within W of the sum, and both distributions have less than
    4 exp(−`TAIL`) beyond.
    """
    window = devices / 2 + share_units * math.sqrt(2 * TAIL * devices)
    return width * ((window + 1) * aliasing(devices, share_units) + 4 * math.exp(-TAIL))


def rotated(row: Row, seed: int) -> Row:
    """R x with an orthogonal R: random signs, then the cosine transform, so that no number of a row stands out.

    As the randomised Hadamard transform of Kairouz et al. 2021, Sec. 4, but of any width.
    """
    turned: Row = dct(row * _signs(row.size, seed), norm="ortho")
    return turned


def turned_back(row: Row, seed: int) -> Row:
    """R⁻¹ x."""
    straight: Row = idct(row, norm="ortho") * _signs(row.size, seed)
    return straight


def _signs(width: int, seed: int) -> Row:
    coins = np.random.Generator(np.random.Philox(key=seed)).integers(0, 2, width)
    return np.where(coins == 1, 1.0, -1.0)


def packed(numbers: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """The lowest `bits` of each number (P,), one after the other: (⌈P · bits / 8⌉,)."""
    places = np.arange(bits - 1, -1, -1, dtype=np.uint32)
    digits = (numbers[:, None] >> places) & np.uint32(1)
    return np.packbits(digits.astype(np.uint8))


def unpacked(sent: npt.NDArray[np.uint8], width: int, bits: int) -> npt.NDArray[np.uint32]:
    """What `packed` has packed."""
    digits = np.unpackbits(sent, count=width * bits).reshape(width, bits).astype(np.uint32)
    weights = np.uint32(1) << np.arange(bits - 1, -1, -1, dtype=np.uint32)
    numbers: npt.NDArray[np.uint32] = (digits * weights).sum(1, dtype=np.uint32)
    return numbers


def packed_bytes(width: int, bits: int) -> int:
    """Of so many numbers."""
    return -(-width * bits // 8)
