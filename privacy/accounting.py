"""What a device's noisy steps cost: events in, ε out, by privacy loss distributions (PLD).

An event says what happened (σ, q, T), not what it cost, so that every accountant can be asked again. The
neighbours differ in the content of one example ("replace one"): a pool of fixed size drops one dialogue when it
takes another in. PLD: Sommer et al. 2019; Koskela et al. 2020; computed by `dp-accounting`. The Gaussian-DP
approximation under-reports and is not offered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import dp_accounting
import numpy as np
import numpy.typing as npt
from dp_accounting.pld import PLDAccountant

from privacy.errors import UserError

Adjacency = Literal["replace-one", "add-or-remove-one"]
NEIGHBOURS = {
    "replace-one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    "add-or-remove-one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
}
DISCRETIZATION = 1e-3  # of the privacy loss; pessimistic, so that ε is an upper bound


class BudgetError(UserError):
    """A promise that no noise keeps, or nothing to keep it for; names the settings."""


@dataclass(frozen=True, slots=True)
class Event:
    """`steps` Gaussian mechanisms, each on a Poisson sample."""

    noise_multiplier: float
    sampling_rate: float
    steps: int


def epsilon(events: Iterable[Event], delta: float, adjacency: Adjacency = "replace-one") -> float:
    """The ε of all events together at `delta`; infinite when one of them adds no noise."""
    return _epsilon(_together(events), delta, adjacency)


def _together(events: Iterable[Event]) -> tuple[Event, ...]:
    """Events that are alike as one: composing them is then one power, not many products."""
    steps: Counter[tuple[float, float]] = Counter()
    for e in events:
        steps[e.noise_multiplier, e.sampling_rate] += e.steps
    return tuple(Event(*alike, n) for alike, n in sorted(steps.items()) if n)


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float, adjacency: Adjacency) -> float:
    if any(e.noise_multiplier <= 0 for e in events):
        return float("inf")
    return float(_accountant(events, adjacency).get_epsilon(delta)) if events else 0.0


@lru_cache(maxsize=256)
def _accountant(events: tuple[Event, ...], adjacency: Adjacency) -> PLDAccountant:
    accountant = PLDAccountant(NEIGHBOURS[adjacency], value_discretization_interval=DISCRETIZATION)
    for e in events:
        gaussian = dp_accounting.GaussianDpEvent(e.noise_multiplier)
        step = dp_accounting.PoissonSampledDpEvent(e.sampling_rate, gaussian)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, e.steps))
    return accountant


@lru_cache(maxsize=256)
def calibrate(
    target_epsilon: float, delta: float, sampling_rate: float, steps: int, adjacency: Adjacency = "replace-one"
) -> float:
    """The smallest noise multiplier, to 0.1 %, whose `steps` steps cost at most `target_epsilon`.

    Raises `BudgetError` when even the noise multiplier 1,000 is too little.
    """
    low, high = 0.0, 0.5
    while epsilon([Event(high, sampling_rate, steps)], delta, adjacency) > target_epsilon:
        low, high = high, high * 2
        if high > 1000:
            raise BudgetError(
                f"epsilon = {target_epsilon} cannot be reached with {steps} steps at sampling rate {sampling_rate}; "
                f"raise [privacy] epsilon or lower the rounds or [shared] steps_per_round"
            )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        cost = epsilon([Event(middle, sampling_rate, steps)], delta, adjacency)
        low, high = (low, middle) if cost <= target_epsilon else (middle, high)
    return high


def tradeoff(
    events: Iterable[Event], adjacency: Adjacency = "replace-one"
) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """The highest true positive rate of any membership test as a function of its false positive rate, all events seen.

    inf over ε of δ(ε) + e^ε · FPR, and the same with the hypotheses exchanged (Dong et al. 2019).
    """
    grid = np.concatenate([np.linspace(0, 2, 41), np.linspace(2.1, 30, 100)])
    together = _together(events)
    profile = np.array([_delta(together, float(e), adjacency) for e in grid])  # (E,)

    def highest(rates: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        direct = (profile[:, None] + np.exp(grid)[:, None] * rates).min(0)
        exchanged = (1 - np.exp(-grid)[:, None] * (1 - profile[:, None] - rates)).min(0)
        lowest: npt.NDArray[np.float64] = np.minimum(1.0, np.minimum(direct, exchanged))
        return lowest

    return highest


def _delta(events: tuple[Event, ...], target: float, adjacency: Adjacency) -> float:
    return float(_accountant(events, adjacency).get_delta(target))
