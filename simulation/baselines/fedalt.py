"""FedALT: each device's own adapter beside the rest of the world's (Bian et al. 2025, arXiv 2503.11880).

    y = W x + g(x) · B_k A_k x + (1 − g(x)) · B_r A_r x,   g(x) = σ(w · x), a gate of each layer, by token
    A_r = 1/(K − 1) Σ over j ≠ k of A_j, and so B_r: the mean of all the others' adapters, factor by factor

A device trains A_k, B_k and the gates; A_r, B_r are frozen, and its own adapter is never overwritten. The paper's
mixer is a softmax over two products with x; σ of their difference is the same function. Here the gates begin at 1/2
and are not sent (in the authors' code averaging them is an option that is off by default), and all adapters begin with
the same A, without which a mean of A would be a mean of unrelated projections.

What is sent is the whole own adapter: the server sees what the other rivals keep on the device. Under DP a device
would have to send clipped changes since the last round, the server to add noise to their sum over all, once, and each
device to take its own off again to have the mean of the others; each mean of A and of B would be protected, their
product would carry both noises, and all that was learned would be paid for, there being no other adapter. That is not
covered: with `privacy.mode` other than `none` this rival is refused.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from florilegium.client.lm.adapter import AdapterLayout
from florilegium.simulation.baselines.context import BaselineContext, Held, Lessons
from florilegium.simulation.evaluation.metrics import Arm


def start(context: BaselineContext, devices: int) -> Held:
    gates = torch.zeros(devices, gated(context).width - context.layout.width)
    first = context.first.repeat(devices, 1)
    return Held(first, torch.cat([first, gates], 1))


def fedalt(held: Held, sets: Lessons, context: BaselineContext) -> tuple[torch.Tensor, torch.Tensor]:
    """All steps on the own adapter and its gates; the adapter without the gates is sent."""
    world = context.lm.adapters(context.layout, held.shared)
    own = context.train(gated(context), held.own, sets, [world])
    return own, own[:, : context.layout.width]


def shares(held: Held, sent: torch.Tensor, context: BaselineContext, number: int) -> torch.Tensor:
    """What each device receives of what all have sent."""
    return rest_of_world(sent)


def arm(held: Held, context: BaselineContext) -> Arm:
    return [context.lm.adapters(context.layout, held.shared), context.lm.adapters(gated(context), held.own)]


def gated(context: BaselineContext) -> AdapterLayout:
    """The layout of own adapters: the factors as in every other, then the gates."""
    return replace(context.layout, gated=True)


def rest_of_world(sent: torch.Tensor) -> torch.Tensor:
    """Of each device the mean of the others' rows; (K, P) of (K, P), K > 1."""
    exact = sent.double()
    return ((exact.sum(0) - exact) / (len(sent) - 1)).float()
