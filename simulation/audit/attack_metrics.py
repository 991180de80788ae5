"""How well an attack tells one thing from another, and the most that a budget allows any attack."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from florilegium.client.calibration import planned_event
from florilegium.client.config import DeviceConfig
from florilegium.privacy.accounting import Event, tradeoff

RATES = (0.01, 0.001)  # false positive rates at which attacks are told


@dataclass(frozen=True)
class Attack:
    """The figures of an attack. Ceilings are 1 where no budget bounds it."""

    name: str
    members: int
    strangers: int
    auc: float
    ci95: tuple[float, float]
    auc_ceiling: float
    tpr_at_fpr: dict[float, float]
    tpr_ceiling: dict[float, float]
    tpr_within: bool  # whether nothing shows, at 99.9 % of both rates, that the curve is exceeded

    @property
    def within(self) -> bool:
        """Whether nothing shows that more is told than is allowed."""
        return self.ci95[0] <= self.auc_ceiling and self.tpr_within


@dataclass(frozen=True)
class Ceiling:
    """The most that any attack can reach on what one dialogue's, or one device's, budget paid for."""

    auc: float = 1.0
    tpr: tuple[float, ...] = (1.0,) * len(RATES)  # at RATES
    exposure_bits: float = math.inf  # mean over canaries
    curve: Callable[[np.ndarray], np.ndarray] = np.ones_like  # the highest TPR at each FPR

    @classmethod
    def of(cls, config: DeviceConfig) -> Ceiling:
        """Of telling one dialogue from another in its place, all planned releases seen; none in mode `none`.

        That is "replace one" in every mode: in another dialogue's company a device's change is another change.
        """
        events = planned_events(config)
        if not events or not events[0].noise_multiplier:
            return cls()
        curve = tradeoff(events, "replace-one")
        grid = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 5000)])
        rates = curve(grid)
        # a canary has -log2 of the share of strangers above it; the most is had where ranks follow the curve
        bits = float((np.diff(rates) * -np.log2(grid[1:])).sum() + rates[0] * -np.log2(grid[1]))
        return cls(float(np.trapezoid(rates, grid)), tuple(curve(np.array(RATES)).tolist()), bits, curve)


def planned_events(config: DeviceConfig) -> list[Event]:
    """All that a dialogue, or a device, may be part of."""
    releases = min(config.rounds, config.privacy.releases or config.rounds)
    return [planned_event(config)] * releases


def judge(name: str, score: np.ndarray, member: np.ndarray, ceiling: Ceiling) -> Attack:
    """The figures of scores (n,), higher where the attacker believes "member" (n,)."""
    inside, outside = score[member], score[~member]
    ranks = stats.rankdata(score)
    n, m = len(inside), len(outside)
    auc = float((ranks[member].sum() - n * (n + 1) / 2) / (n * m))
    half = 1.96 * _standard_error(auc, n, m)
    rates = {rate: float((inside > np.quantile(outside, 1 - rate)).mean()) for rate in RATES}
    allowed = dict(zip(RATES, ceiling.tpr, strict=True))
    within = all(_allowed(inside, outside, rate, ceiling) for rate in RATES)
    return Attack(name, n, m, auc, (auc - half, auc + half), ceiling.auc, rates, allowed, within)


def _allowed(inside: np.ndarray, outside: np.ndarray, rate: float, ceiling: Ceiling) -> bool:
    """Clopper and Pearson (1934): the lower end of the TPR's interval against the curve at the FPR's upper end."""
    threshold = np.quantile(outside, 1 - rate)
    caught, wrong = int((inside > threshold).sum()), int((outside > threshold).sum())
    low = float(stats.beta.ppf(0.001, caught, len(inside) - caught + 1)) if caught else 0.0
    high = float(stats.beta.ppf(0.999, wrong + 1, len(outside) - wrong)) if wrong < len(outside) else 1.0
    return low <= float(ceiling.curve(np.array([high]))[0])


def _standard_error(auc: float, n: int, m: int) -> float:
    """Of an AUC (Hanley and McNeil 1982)."""
    one, two = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n - 1) * (one - auc**2) + (m - 1) * (two - auc**2)
    return math.sqrt(max(0.0, variance) / (n * m))
