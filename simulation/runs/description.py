"""What a run says of itself: its model, its people, its promise, its machine."""

from __future__ import annotations

import os
import resource
from importlib.metadata import version
from typing import Any

from florilegium.client.calibration import planned_event
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.population import Bootstrapped, met_before
from florilegium.simulation.devices.people import UsersByDevice
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.runs.folder import sources_sha256


def describe(config: ExperimentConfig, devices: SimulatedDevices) -> dict[str, Any]:
    """The facts of a run that do not change: what, on what, under which promise."""
    lm, promise, event = devices.context.lm, config.privacy.promise, planned_event(config)
    return {
        "name": config.name,
        "engine": config.engine.name,
        "seed": config.seed,
        "rounds": config.rounds,
        "devices": config.data.users,
        "model": {
            "name": lm.name,
            "parameters": sum(p.numel() for p in lm.engine.model.parameters()),
            "architecture": type(lm.engine.model).__name__,
            "dtype": str(lm.engine.dtype).removeprefix("torch."),
        },
        "data": {"name": config.data.name, "split": config.data.split, **people(devices.users)},
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {lm.engine.device}",
        "versions": {name: version(name) for name in ("florilegium", "torch", "flwr", "opacus", "peft")},
        "privacy": {
            "mode": config.privacy.mode,
            "unit": promise.unit,
            "adjacency": promise.adjacency,
            "trust": promise.trust,
            "not_covered": promise.not_covered,
            "epsilon_budget": config.privacy.epsilon,
            "delta": config.privacy.delta,
            "noise_multiplier": event.noise_multiplier,
            "clip_norm_l2": config.privacy.clip_norm_l2,
            "sampling_rate": event.sampling_rate,
            "steps_per_round": event.steps,
            "accountant": "PLD",
        },
        "sources": sources_sha256(config.extensions()),
        "config": config.model_dump(mode="json"),
    }


def people(users: UsersByDevice) -> dict[str, int]:
    """How many there are, without those that are resampled from others, and what is held out of what they said."""
    population = users.population
    persons = population.people if isinstance(population, Bootstrapped) else population
    return {
        "people": len(persons),
        "held_out": sum(len(user.held_out) for user in persons),
        "held_out_met": sum(met_before(user.stream, user.held_out) for user in persons),
    }


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
