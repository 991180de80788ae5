"""What a device plans to spend of its privacy budget, and how much noise its promise needs, by its settings alone."""

from __future__ import annotations

import math

from florilegium.client.config import DeviceConfig
from florilegium.privacy.accounting import BudgetError, Event, calibrate
from florilegium.privacy.noise import ReleaseNoise
from florilegium.privacy.release import Schema
from florilegium.privacy.secure_aggregation.rounded_noise import SumCode, total_variation
from florilegium.privacy.secure_aggregation.rounded_noise import sum_code as code_of_sum
from florilegium.privacy.seeds import derive_seed

NEGLIGIBLE = 1e-9  # of δ: what is below is not reckoned


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


def release_noise(config: DeviceConfig, bands: int, secret: int) -> ReleaseNoise:
    """What is added to each number of a release on the device, or of a round's sum on the server."""
    privacy, shared = config.privacy, config.shared
    std = planned_event(config).noise_multiplier * privacy.clip_norm_l2
    if not std:
        return ReleaseNoise()
    if privacy.distributed:
        return ReleaseNoise(on_device=share_std(config))
    if privacy.mode == "user-central":
        return ReleaseNoise(on_sum=std, bands=bands, secret=secret)
    if privacy.mode == "user-local":
        return ReleaseNoise(on_device=std)
    per_step = std / (shared.sampling_rate * shared.pool_capacity)
    kept = 1 - shared.learning_rate * shared.proximal  # of each step's noise, after one more step
    squares = sum(kept ** (2 * later) for later in range(shared.steps_per_round))
    return ReleaseNoise(on_device=float(shared.learning_rate * per_step * squares**0.5))


def share_std(config: DeviceConfig) -> float:
    """Of the noise that one device adds to each number of its part of a sum.

    σ times what one unit of privacy may move, over √(survivors − colluding): the honest ones' shares alone are enough.
    Raises `BudgetError` where nobody has said of how many devices a sum is.
    """
    summed = config.summed
    if not summed.devices:
        raise BudgetError("secure_aggregation.devices = 0 says nothing of how many devices a sum is; set it")
    sigma = planned_event(config).noise_multiplier
    return sigma * moved_l2(config) / math.sqrt(summed.survivors - summed.colluding)


def moved_l2(config: DeviceConfig) -> float:
    """By how much one dialogue, or one device, may be part of a device's change: its norm after clipping."""
    privacy, shared = config.privacy, config.shared
    if not privacy.by_dialogue:
        return privacy.clip_norm_l2
    return shared.learning_rate * privacy.clip_norm_l2 / (shared.sampling_rate * shared.pool_capacity)


def sum_code(config: DeviceConfig, schema: Schema, number: int, seed: int) -> SumCode:
    """How the rows that travel in round `number` become integers; `seed` is public. Raises `TooFewBitsError`."""
    summed, longest = config.summed, moved_l2(config)
    if config.privacy.by_dialogue:
        longest *= config.shared.pool_capacity  # all of a pool may be drawn
    rotation = derive_seed(seed, "rotation", number)
    width = schema.of_round(number).width
    code = code_of_sum(width, summed.devices, longest, share_std(config), summed.bits, rotation)
    apart = total_variation(width, summed.survivors - summed.colluding, code.share_std / code.unit)
    if not apart * (1 + math.exp(config.privacy.epsilon)) * config.rounds < NEGLIGIBLE * config.privacy.delta:
        raise BudgetError(f"rounding {width:,} numbers adds {apart:.1g} a round to delta, which is more than nothing")
    return code


def release_limits(config: DeviceConfig, schema: Schema) -> tuple[float, float]:
    """The norm that no honest release exceeds, but for a chance below 1e-9, and the one that a server clips to.

    A step moves the adapter by at most learning_rate · C / q, as all of a pool may be drawn; noise of standard
    deviation s has a norm below s (√P + 7) (Laurent and Massart 2000, Lemma 1, with x = 24). Rounding to 8 bits adds
    at most √n / 254 of the norm of an array of n numbers.
    """
    privacy, shared = config.privacy, config.shared
    if privacy.distributed:  # nobody sees one
        return math.inf, math.inf
    signal = privacy.clip_norm_l2
    if privacy.by_dialogue:
        signal *= shared.learning_rate * shared.steps_per_round / shared.sampling_rate
    rounding = 1.001 + max(math.prod(shape) for _, shape in schema.shapes) ** 0.5 / 254 * (shared.upload == "int8")
    rounding += 2**-8 * (shared.upload == "bf16")
    largest = rounding * (1.001 * signal + release_noise(config, 1, 0).on_device * (schema.width**0.5 + 7))
    return largest, privacy.clip_norm_l2 if privacy.mode == "user-central" else math.inf
