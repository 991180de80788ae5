"""The controls and the reference: learning alone, one model for all, and a personal adapter on top of a shared one.

`local` has no server. `fedavg` (McMahan et al. 2017, arXiv 1602.05629) trains one adapter for all. `fedprox` (Li et
al. 2020, arXiv 1812.06127) gives each device the loss F_k(w) + μ/2 ‖w − w_received‖²; with AdamW the pull is rescaled
with the gradient that it is part of, which the paper's SGD does not do. Devices that do less than the others, the
paper's other subject, are not covered. `ours` is this project's scheme with nothing but the two adapters: a shared one
from half of the steps, then, frozen, beneath a personal one that never leaves.
"""

from __future__ import annotations

import torch

from florilegium.simulation.baselines.context import Ground, Held, Lessons, aggregate, halves, upload
from florilegium.simulation.evaluation.metrics import Arm


def start_local(ground: Ground, devices: int) -> Held:
    return Held(torch.zeros(1, 0), ground.first.repeat(devices, 1))


def local(held: Held, lessons: Lessons, ground: Ground, number: int) -> tuple[Held, torch.Tensor]:
    """All steps on the device's own adapter; nothing is sent."""
    own = ground.train(ground.layout, held.own, lessons)
    return Held(held.shared, own), torch.zeros(len(own), 0)


def local_arm(held: Held, ground: Ground) -> Arm:
    return [ground.lm.adapters(ground.layout, held.own)]


def start_global(ground: Ground, devices: int) -> Held:
    return Held(ground.first, torch.zeros(devices, 0))


def fedavg(
    held: Held, lessons: Lessons, ground: Ground, number: int, proximal: float = 0.0
) -> tuple[Held, torch.Tensor]:
    """All steps on the shared adapter; the mean of the changes is added to it."""
    trained = ground.train(ground.layout, held.shared, lessons, proximal=proximal)
    sent = upload(trained - held.shared, ground)
    return Held(held.shared + aggregate(sent, ground, number), held.own), sent


def fedprox(held: Held, lessons: Lessons, ground: Ground, number: int) -> tuple[Held, torch.Tensor]:
    """As `fedavg`, near to what was received; with μ = 0 the same bit by bit."""
    return fedavg(held, lessons, ground, number, proximal=ground.config.shared.proximal)


def global_arm(held: Held, ground: Ground) -> Arm:
    return [ground.lm.adapters(ground.layout, held.shared)]


def start_ours(ground: Ground, devices: int) -> Held:
    return Held(ground.first, ground.first.repeat(devices, 1))


def ours(held: Held, lessons: Lessons, ground: Ground, number: int) -> tuple[Held, torch.Tensor]:
    """Half of the steps on the shared adapter, then half on the personal one on top of the new shared one."""
    to_share, to_keep = halves(lessons)
    after, sent = fedprox(held, to_share, ground, number)
    beneath = ground.lm.adapters(ground.layout, after.shared)
    return Held(after.shared, ground.train(ground.layout, held.own, to_keep, [beneath])), sent


def ours_arm(held: Held, ground: Ground) -> Arm:
    return [*global_arm(held, ground), *local_arm(held, ground)]
