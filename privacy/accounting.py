"""What a device's noisy steps cost: events in, ε out, by privacy loss distributions (PLD).

An event says what happened (σ, q, T), not what it cost, so that every accountant can be asked again. The
neighbours differ in the content of one example ("replace one"): a pool of fixed size drops one dialogue when it
takes another in. PLD: Sommer et al. 2019; Koskela et al. 2020; computed by `dp-accounting`. The Gaussian-DP
approximation under-reports and is not offered.

The losses are put on a grid, rounded up: a coarser one costs less memory and reports more, never less. It is as fine as
`DISCRETIZATION` where `STEP_POINTS` of it hold the losses of one step and `POINTS` those of all, and coarser beyond, so
that whatever is asked takes some tens of megabytes.
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
from dp_accounting.pld.common import compute_self_convolve_bounds
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

from florilegium.privacy.common.errors import UserError

Adjacency = Literal["replace-one", "add-or-remove-one"]
NEIGHBOURS = {
    "replace-one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    "add-or-remove-one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
}
SENSITIVITY = {"replace-one": 2.0, "add-or-remove-one": 1.0}  # of a clipped sum, in clipping norms
DISCRETIZATION = 1e-3  # of the privacy loss; pessimistic, so that ε is an upper bound
STEP_POINTS, POINTS, ROUGH_POINTS = 2**16, 2**18, 2**11  # at most: of one step, of all events; to find how many
TAIL, TAIL_MASS = 10.0, 1e-15  # standard deviations of noise that count; what `dp-accounting` leaves out of a product
SMALLEST_NOISE = 2**-5  # multiplier that is ever planned with


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


def covered(events: Iterable[Event]) -> bool:
    """Whether spending until ε would exceed a budget keeps it although what is spent was chosen after releases.

    Of steps that are all alike: they are the first of a sequence that was fixed before, and whatever adapter each is
    asked about, the same pair of distributions dominates it (Zhu, Dong and Wang 2022, arXiv 2106.08567, on adaptive
    composition). Of Gaussians without sampling: Gaussian DP has such a filter (Smith and Thakurta 2022, arXiv
    2210.17520; Koskela et al. 2023, arXiv 2209.15596). Of other mixtures privacy loss distributions have none that
    would be valid in general (arXiv 2602.06756, arXiv 2602.15815): who chooses the next noise or rate after having
    seen releases may choose the one that tells more about what these have left open.
    """
    kinds = {(e.noise_multiplier, e.sampling_rate) for e in events}
    return len(kinds) <= 1 or all(rate == 1 for _, rate in kinds)


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


@lru_cache(maxsize=32)  # each holds up to some megabytes
def _accountant(events: tuple[Event, ...], adjacency: Adjacency) -> PLDAccountant:
    accountant = PLDAccountant(NEIGHBOURS[adjacency], value_discretization_interval=interval(events, adjacency))
    for e in events:
        gaussian = dp_accounting.GaussianDpEvent(e.noise_multiplier)
        step = dp_accounting.PoissonSampledDpEvent(e.sampling_rate, gaussian)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, e.steps))
    return accountant


def interval(events: Iterable[Event], adjacency: Adjacency) -> float:
    """Of the grid for the losses of all these together."""
    largest = max((_largest_loss(e.noise_multiplier, adjacency) for e in events), default=0.0)
    together = sum(_span(e, adjacency) for e in events)
    return max(DISCRETIZATION, largest / STEP_POINTS, together / POINTS)


def _largest_loss(noise_multiplier: float, adjacency: Adjacency) -> float:
    """Of one step, whatever is sampled, but for a chance that is left out anyway."""
    shift = SENSITIVITY[adjacency] / noise_multiplier
    return shift**2 + 2 * TAIL * shift  # from one end to the other


def _span(event: Event, adjacency: Adjacency) -> float:
    """How far apart the losses of all steps of an event lie, found on a rough grid."""
    rough = _largest_loss(event.noise_multiplier, adjacency) / ROUGH_POINTS
    step = from_gaussian_mechanism(
        event.noise_multiplier, value_discretization_interval=rough, sampling_prob=event.sampling_rate,
        neighboring_relation=NEIGHBOURS[adjacency],
    )  # fmt: skip
    widths = list[float]()
    for pmf in {id(p): p.to_dense_pmf() for p in (step._pmf_remove, step._pmf_add)}.values():
        low, high = compute_self_convolve_bounds(pmf._probs, event.steps, TAIL_MASS)
        widths.append(max(high - low, len(pmf._probs)) * rough)
    return max(widths)


@lru_cache(maxsize=256)
def calibrate(
    target_epsilon: float, delta: float, sampling_rate: float, steps: int, adjacency: Adjacency = "replace-one"
) -> float:
    """The smallest noise multiplier, to 0.1 %, whose `steps` steps cost at most `target_epsilon`.

    Never below `SMALLEST_NOISE`. Raises `BudgetError` where chance alone would keep the promise, with no noise at all,
    and when even the noise multiplier 1,000 is too little.
    """
    if sampling_rate * steps <= delta:
        raise BudgetError(
            f"sampling rate {sampling_rate:g} in {steps:,} steps: that anything is drawn has a chance below "
            f"delta = {delta:g}, so that no noise would be added to what is drawn; lower [privacy] delta or raise "
            f"[shared] sampling_rate"
        )
    low, high = 0.0, 0.5
    while epsilon([Event(high, sampling_rate, steps)], delta, adjacency) > target_epsilon:
        low, high = high, high * 2
        if high > 1000:
            raise BudgetError(
                f"epsilon = {target_epsilon} cannot be reached with {steps} steps at sampling rate {sampling_rate}; "
                f"raise [privacy] epsilon or lower the rounds or [shared] steps_per_round"
            )
    while high - low > 1e-3 * high and high > SMALLEST_NOISE:
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
