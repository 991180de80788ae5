"""How the releases of a round become one change: a mean, or a rule that a few false releases move less.

A rule takes releases one by one, in any order, and its change has the same bits in every order: sums are in 64-bit
fixed point, ties go by the device's name. Rules that sum keep nothing of a release; robust ones keep all rows of a
round, 4 P bytes each, and say so in `held_bytes`. Robust rules are no sums: what bounds one device's part of a sum
does not bound its part of their change, so noise on the sum belongs to `Mean` alone. Noise that
devices add is what robust rules see too: releases then lie about √(2P)·σ apart, and a false one that is nearer than
that is not seen. A rule of the user's own is a module's `NAME(width, settings)` that gives a `Rule`; it is made once a
round, and with width 1 where the settings are read. Not covered: weights by norm (HetLoRA's), Bulyan, geometric
medians, defences across rounds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from florilegium.privacy.common.errors import FlorilegiumError
from florilegium.privacy.common.registry import UnexpectedError, calling, is_extension, resolve
from florilegium.privacy.release import Array
from florilegium.server.fixed_point import BadReleaseError, FixedPointSum, Numbers

Places = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]

LARGEST_KEPT = 2.0**12  # a sum has room for 2,048 rows of such numbers, so no sender can fill it for the others
BLOCK = 2**16  # numbers of each row that are sorted or compared at once


class TooFewReleasesError(FlorilegiumError):
    """A round has too few releases for what its rule promises: the round changes nothing."""


class RuleSettings(Protocol):
    """What rules read of the server's settings."""

    @property
    def trimmed_share(self) -> float: ...
    @property
    def byzantine(self) -> int: ...
    @property
    def krum_keep(self) -> int: ...


@runtime_checkable
class Rule(Protocol):
    """Releases in, one change out.

    One that `is_sum` divides a sum of releases: it takes their weights and parts of them, and noise on the sum protects
    what it gives. Any other judges whole releases together, as `KeptRows` do.
    """

    @property
    def is_sum(self) -> bool:
        """Whether it divides a sum of releases."""

    @property
    def least_releases(self) -> int:
        """Below which a round's rule is not what it is called; at least 1."""

    @property
    def count(self) -> int:
        """Releases so far."""

    @property
    def senders(self) -> Counts | int:
        """Releases that held each number (P,), or all of them."""

    @property
    def held_bytes(self) -> int:
        """What is kept until the change is asked for."""

    def add(self, device: str, row: Array, places: Places | None = None, weight: float = 1.0) -> None:
        """Takes one release (P,). Raises `BadReleaseError` for what cannot be one; the rule is then as it was."""

    def change(self, noise: Numbers | float = 0.0, over: Counts | int = 0) -> Array:
        """The change (P,) float32 of the shared adapter; zero when nothing was added. What is no sum takes no noise."""


class Mean:
    """The mean of each number over those devices that train it (McMahan et al. 2017, arXiv 1602.05629), weighing alike.

    With adapters of different ranks zero-padding (as in HetLoRA, Cho et al. 2024, arXiv 2401.06432) would change a part
    of the rank that one device in ten trains by a tenth of what that device found; here it changes by all of it.
    """

    is_sum = True
    least_releases = 1

    def __init__(self, width: int) -> None:
        self.total = FixedPointSum(width)
        self.senders: Counts = np.zeros(width, dtype=np.int64)  # (P,) releases that held each number

    @property
    def count(self) -> int:
        return self.total.count

    @property
    def held_bytes(self) -> int:
        return self.total.units.nbytes + self.senders.nbytes

    def add(self, device: str, row: Array, places: Places | None = None, weight: float = 1.0) -> None:
        """Takes a row (P,) that is zero outside `places` (P,); without them the device trains every number."""
        if row.shape != self.senders.shape:
            raise BadReleaseError(f"a release of shape {row.shape} does not fit {self.senders.shape}")
        if places is not None and (places.shape != row.shape or row[~places].any()):
            raise BadReleaseError(f"the release of {device} has numbers where the device trains none")
        self.total.add(row if weight == 1 else row * np.float32(weight))
        self.senders += 1 if places is None else places

    def change(self, noise: Numbers | float = 0.0, over: Counts | int = 0) -> Array:
        """Σ_k w_k x_kp + noise_p by `over`, or by the number of k that sent p; zero where nobody did.

        With noise on the sum, `over` has to be public: how many devices that train p were asked, not who answered.
        """
        by = over if np.any(over) else self.senders
        return np.where(by > 0, (self.total.numbers + noise) / np.maximum(1, by), 0.0).astype(np.float32)


class KeptRows(ABC):
    """All rows of a round by device, for rules that have to see them together."""

    is_sum: ClassVar[bool] = False

    def __init__(self, width: int) -> None:
        self.width = width
        self.rows: dict[str, Array] = {}

    @property
    def count(self) -> int:
        """Releases so far."""
        return len(self.rows)

    @property
    def least_releases(self) -> int:
        """As in `Rule`."""
        return 1

    @property
    def senders(self) -> int:
        """As in `Rule`; each number is in all releases."""
        return self.count

    @property
    def held_bytes(self) -> int:
        """Bytes of the rows that are kept."""
        return sum(row.nbytes for row in self.rows.values())

    def add(self, device: str, row: Array, places: Places | None = None, weight: float = 1.0) -> None:
        """Raises `BadReleaseError` also for a second release of one device: two votes would halve what is tolerated."""
        if weight != 1.0 or (places is not None and not places.all()):
            raise ValueError(f"{type(self).__name__} weighs whole releases alike; use rule = 'mean'")
        check_row(row, self.width, LARGEST_KEPT)
        if device in self.rows:
            raise BadReleaseError(f"{device} has sent a release already")
        self.rows[device] = row.astype(np.float32)

    def change(self, noise: Numbers | float = 0.0, over: Counts | int = 0) -> Array:
        """What is `chosen`; raises `ValueError` for noise or a divisor, which are of a sum."""
        if np.any(noise) or np.any(over):
            raise ValueError(f"{type(self).__name__} is no sum: noise on a sum does not protect it; use rule = 'mean'")
        return self.chosen()

    @abstractmethod
    def chosen(self) -> Array:
        """The change (P,) float32, of all rows."""

    def by_name(self) -> list[Array]:
        """The rows (P,) float32 in the order of the devices' names, whichever came first."""
        return [self.rows[device] for device in sorted(self.rows)]


class TrimmedMean(KeptRows):
    """The mean of each number without its ⌊share · n⌋ smallest and largest (Yin et al. 2018, arXiv 1803.01498, Def. 2).

    Each number lies between the smallest and the largest that was sent, to one unit of the fixed point (2⁻⁴⁰) and
    float32's rounding; if no more than ⌊share · n⌋ devices lie, between those of the honest. With share = 0 it is
    `Mean` to the bit.
    """

    def __init__(self, width: int, share: float) -> None:
        super().__init__(width)
        if not 0 <= share < 0.5:
            raise ValueError(f"trimmed_share = {share} must be in [0, 0.5): it is taken off at both ends")
        self.share = share

    @property
    def least_releases(self) -> int:
        """Below which nothing is trimmed."""
        return math.ceil(1 / self.share - 1e-9) if self.share else 1

    def chosen(self) -> Array:
        rows, cut = self.by_name(), trimmed(self.share, self.count)
        if not rows:
            return np.zeros(self.width, dtype=np.float32)
        starts = range(0, self.width, BLOCK)
        blocks = (np.stack([row[start : start + BLOCK] for row in rows]) for start in starts)  # (n, BLOCK) each
        return np.concatenate([_mean(np.sort(block, axis=0)[cut : len(rows) - cut]) for block in blocks])


def trimmed(share: float, count: int) -> int:
    """⌊share · count⌋, where 0.29 · 100 is 29."""
    return min(math.floor(share * count + 1e-9), max(0, count - 1) // 2)


class Krum(KeptRows):
    """The mean of the `keep` rows that lie nearest to others (multi-Krum, Blanchard et al. 2017, NeurIPS).

    The score of a row is the sum of squared distances to its n − f − 2 nearest others, f being how many of them may be
    false; keep = 1 is Krum. With n ≥ 2 f + 3 and keep ≤ n − f, no false row is kept that is farther from every honest
    one, in squared distance, than any honest one's score.
    """

    def __init__(self, width: int, byzantine: int, keep: int = 1) -> None:
        super().__init__(width)
        if byzantine < 0 or keep < 1:
            raise ValueError(f"byzantine = {byzantine} must be at least 0 and keep = {keep} at least 1")
        self.byzantine, self.keep = byzantine, keep

    @property
    def least_releases(self) -> int:
        """Below which a far false one may be kept: n ≥ 2 f + 3, and keep ≤ n − f."""
        return max(2 * self.byzantine + 3, self.keep + self.byzantine)

    def scores(self) -> dict[str, float]:
        """Of each device; the smaller, the nearer others are. Raises `TooFewReleasesError` below 2 f + 3 releases."""
        if self.count < (needed := self.least_releases):
            raise TooFewReleasesError(
                f"krum with byzantine = {self.byzantine} and keep = {self.keep} needs {needed} releases, "
                f"this round has {self.count}; lower them or ask more devices"
            )
        nearest = np.sort(squared_distances(self.by_name()), axis=1)  # (n, n), each row's own 0 first
        near = nearest[:, 1 : self.count - self.byzantine - 1].sum(axis=1)  # (n,) of n − f − 2 others
        return dict(zip(sorted(self.rows), near.tolist(), strict=True))

    def kept(self) -> list[str]:
        """The devices whose rows are averaged, nearest first; of equal ones, the first by name."""
        scores = self.scores()
        return sorted(scores, key=lambda device: (scores[device], device))[: self.keep]

    def chosen(self) -> Array:
        return _mean(np.stack([self.rows[device] for device in self.kept()]))


def squared_distances(rows: list[Array]) -> Numbers:
    """(n, n) of ‖x_i − x_j‖², from differences: ‖x‖² + ‖y‖² − 2 x·y would lose near rows beside a far one."""
    found = np.zeros((len(rows), len(rows)))
    for start in range(0, rows[0].size, BLOCK):
        block = np.stack([row[start : start + BLOCK] for row in rows]).astype(np.float64)  # (n, BLOCK)
        for i in range(len(rows) - 1):
            apart = block[i + 1 :] - block[i]
            found[i, i + 1 :] += np.square(apart).sum(axis=1)
    return found + found.T


def check_row(row: Array, width: int, below: float = 2.0**22) -> None:
    """Raises `BadReleaseError` unless a row is (P,) and its numbers are finite and `below` a bound."""
    if row.shape != (width,):
        raise BadReleaseError(f"a release of shape {row.shape} does not fit ({width},)")
    if not np.isfinite(row).all() or np.abs(row).max(initial=0.0) >= below:
        raise BadReleaseError(f"a release holds a number that is not finite or not below {below:g}")


def _mean(rows: Array) -> Array:
    """Of (n, P), in fixed point."""
    mean = Mean(rows.shape[1])
    for row in rows:
        mean.add("", row)
    return mean.change()


RULES: Mapping[str, Callable[[int, RuleSettings], Rule]] = {
    "none": lambda width, config: Mean(width),  # of no releases: nothing changes
    "mean": lambda width, _: Mean(width),
    "trimmed-mean": lambda width, config: TrimmedMean(width, config.trimmed_share),
    "krum": lambda width, config: Krum(width, config.byzantine, config.krum_keep),
}


def new_rule(name: str, width: int, settings: RuleSettings) -> Rule:
    """The rule of a round whose releases have `width` numbers. Raises `ExtensionError` for what gives none."""
    make = resolve(name, RULES, Callable)
    with calling(name, "give a Rule, as `Mean` or what is derived from `KeptRows`"):
        rule: object = make(width, settings)
        if not isinstance(rule, Rule):
            raise UnexpectedError(f"gave {type(rule).__name__}, which is none")
    return CheckedRule(name, width, rule) if is_extension(name) else rule


@dataclass(frozen=True)
class CheckedRule:
    """A rule of the user's own: what it raises or gives that is no change is an `ExtensionError` with its name."""

    name: str
    width: int
    rule: Rule

    @property
    def is_sum(self) -> bool:
        return self.rule.is_sum

    @property
    def least_releases(self) -> int:
        return self.rule.least_releases

    @property
    def count(self) -> int:
        return self.rule.count

    @property
    def senders(self) -> Counts | int:
        return self.rule.senders

    @property
    def held_bytes(self) -> int:
        return self.rule.held_bytes

    def add(self, device: str, row: Array, places: Places | None = None, weight: float = 1.0) -> None:
        with calling(self.name, f"take float32 ({self.width},), or raise BadReleaseError", device):
            self.rule.add(device, row, places, weight)

    def change(self, noise: Numbers | float = 0.0, over: Counts | int = 0) -> Array:
        with calling(self.name, f"return float32 ({self.width},), all finite"):
            change = self.rule.change(noise, over)
            check_array(change, np.float32, (self.width,))
        return change


def check_array(found: object, dtype: type[np.float32] | type[np.float64], *shapes: tuple[int, ...]) -> None:
    """Raises `UnexpectedError` unless it is an array of this type, of one of these shapes, and all finite."""
    if not isinstance(found, np.ndarray):
        raise UnexpectedError(f"returned {type(found).__name__}")
    if found.dtype != dtype or found.shape not in shapes:
        raise UnexpectedError(f"returned {found.dtype} {found.shape}")
    if not np.isfinite(found).all():
        raise UnexpectedError("returned a number that is not finite")
