"""The controls and the reference: learning alone, one model for all, and a personal adapter on top of a shared one.

`local` has no server. `fedavg` (McMahan et al. 2017, arXiv 1602.05629) trains one adapter for all. `fedprox` (Li et
al. 2020, arXiv 1812.06127) gives each device the loss F_k(w) + μ/2 ‖w − w_received‖²; with AdamW the pull is rescaled
with the gradient that it is part of, which the paper's SGD does not do. Devices that do less than the others, the
paper's other subject, are not covered. `ours` is this project's scheme with nothing but the two adapters: a shared one
from half of the steps, then, frozen, beneath a personal one that never leaves.
"""

from __future__ import annotations

import torch

from florilegium.simulation.baselines.context import BaselineContext, Held, Lessons, halves
from florilegium.simulation.evaluation.metrics import Arm


def start_local(context: BaselineContext, devices: int) -> Held:
    return Held(torch.zeros(1, 0), context.first.repeat(devices, 1))


def local(held: Held, sets: Lessons, context: BaselineContext) -> tuple[torch.Tensor, torch.Tensor]:
    """All steps on the device's own adapter; nothing is sent."""
    own = context.train(context.layout, held.own, sets)
    return own, torch.zeros(len(own), 0)


def local_arm(held: Held, context: BaselineContext) -> Arm:
    return [context.lm.adapters(context.layout, held.own)]


def start_global(context: BaselineContext, devices: int) -> Held:
    return Held(context.first, torch.zeros(devices, 0))


def fedavg(
    held: Held, sets: Lessons, context: BaselineContext, proximal: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """All steps on the shared adapter; its change is sent."""
    trained = context.train(context.layout, held.shared, sets, proximal=proximal)
    return held.own, trained - held.shared


def fedprox(held: Held, sets: Lessons, context: BaselineContext) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fedavg`, near to what was received; with μ = 0 the same bit by bit."""
    return fedavg(held, sets, context, proximal=context.config.shared.proximal)


def global_arm(held: Held, context: BaselineContext) -> Arm:
    return [context.lm.adapters(context.layout, held.shared)]


def start_ours(context: BaselineContext, devices: int) -> Held:
    return Held(context.first, context.first.repeat(devices, 1))


def ours(held: Held, sets: Lessons, context: BaselineContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the steps on the shared adapter."""
    return fedprox(held, halves(sets)[0], context)


def ours_after(held: Held, sets: Lessons, context: BaselineContext) -> torch.Tensor:
    """Then half on the personal one, on top of the new shared one."""
    beneath = context.lm.adapters(context.layout, held.shared)
    return context.train(context.layout, held.own, halves(sets)[1], [beneath])


def ours_arm(held: Held, context: BaselineContext) -> Arm:
    return [*global_arm(held, context), *local_arm(held, context)]
