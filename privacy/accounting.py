"""What a device's noisy steps cost: events in, ε out, by privacy loss distributions (PLD).

An event says what happened (σ, q, T), not what it cost, so that every accountant can be asked again. The
neighbours differ in the content of one example ("replace one"): a pool of fixed size drops one dialogue when it
takes another in. PLD: Sommer et al. 2019; Koskela et al. 2020; computed by `dp-accounting`. The Gaussian-DP
approximation under-reports and is not offered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import dp_accounting
from dp_accounting.pld import PLDAccountant

Adjacency = Literal["replace-one", "add-or-remove-one"]
NEIGHBOURS = {
    "replace-one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    "add-or-remove-one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
}
DISCRETIZATION = 1e-3  # of the privacy loss; pessimistic, so that ε is an upper bound


@dataclass(frozen=True, slots=True)
class Event:
    """`steps` Gaussian mechanisms, each on a Poisson sample."""

    noise_multiplier: float
    sampling_rate: float
    steps: int


def epsilon(events: Iterable[Event], delta: float, adjacency: Adjacency = "replace-one") -> float:
    """The ε of all events together at `delta`; infinite when one of them adds no noise."""
    steps: Counter[tuple[float, float]] = Counter()
    for e in events:
        steps[e.noise_multiplier, e.sampling_rate] += e.steps
    return _epsilon(tuple(Event(*alike, n) for alike, n in sorted(steps.items()) if n), delta, adjacency)


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float, adjacency: Adjacency) -> float:
    if any(e.noise_multiplier <= 0 for e in events):
        return float("inf")
    accountant = PLDAccountant(NEIGHBOURS[adjacency], value_discretization_interval=DISCRETIZATION)
    for e in events:
        gaussian = dp_accounting.GaussianDpEvent(e.noise_multiplier)
        step = dp_accounting.PoissonSampledDpEvent(e.sampling_rate, gaussian)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, e.steps))
    return float(accountant.get_epsilon(delta)) if events else 0.0


@lru_cache(maxsize=256)
def calibrate(
    target_epsilon: float, delta: float, sampling_rate: float, steps: int, adjacency: Adjacency = "replace-one"
) -> float:
    """The smallest noise multiplier, to 0.1 %, whose `steps` steps cost at most `target_epsilon`.

    Raises ValueError when even the noise multiplier 1,000 is too little.
    """
    low, high = 0.0, 0.5
    while epsilon([Event(high, sampling_rate, steps)], delta, adjacency) > target_epsilon:
        low, high = high, high * 2
        if high > 1000:
            raise ValueError(
                f"epsilon = {target_epsilon} cannot be reached with {steps} steps at sampling rate {sampling_rate}; "
                f"raise [privacy] epsilon or lower the rounds or [shared] steps_per_round"
            )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        cost = epsilon([Event(middle, sampling_rate, steps)], delta, adjacency)
        low, high = (low, middle) if cost <= target_epsilon else (middle, high)
    return high
