"""What a device plans to spend of its privacy budget, by its settings alone."""

from __future__ import annotations

from florilegium.client.config import DeviceConfig
from florilegium.privacy.accounting import BudgetError, Event, calibrate


def planned_event(config: DeviceConfig) -> Event:
    """What one release spends, with the noise for which all planned ones together cost the whole budget.

    Raises `BudgetError` where nothing is kept to train on, or where no noise is enough.
    """
    shared, privacy = config.shared, config.privacy
    if shared.source == "pool" and not shared.pool_capacity:
        alone = "set it above 0, or server.rule = 'none' for devices that learn alone"
        raise BudgetError(f"shared.pool_capacity = 0 leaves nothing to train a shared adapter on; {alone}")
    rate, steps, releases = planned_steps(config)
    if privacy.mode == "none":
        return Event(0.0, rate, steps)
    sigma = calibrate(privacy.epsilon, privacy.delta, rate, steps * releases, privacy.promise.adjacency)
    return Event(sigma, rate, steps)


def planned_steps(config: DeviceConfig) -> tuple[float, int, int]:
    """The chance of being drawn in a step, the steps of a release, and the releases that one budget is for."""
    shared, privacy = config.shared, config.privacy
    rate, steps = (shared.sampling_rate, shared.steps_per_round) if privacy.by_dialogue else (1.0, 1)
    return rate, steps, min(config.rounds, privacy.releases or config.rounds)
