"""Some layers are everybody's, the others each device's own: FedPer and FedRep.

FedPer (Arivazhagan et al. 2019, arXiv 1912.00818) trains base and personalization layers together and averages the
base layers alone. FedRep (Collins et al. 2021, arXiv 2102.07078) alternates: first the head, on the representation as
it was received, then the representation under the new head; the representation is averaged.

Here base and head are the adapters of the first and of the last adapted layers (`baseline.personal_share`); the frozen
language model and its output layer are the same for all. The papers' head is the last layers of a classifier that all
train from nothing. FedRep's many steps on the head for each one on the representation are half and half here, so that
all rivals take the same steps.

What is sent is a change of the base layers: clipping it whole protects a device, whatever its own layers did.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from florilegium.client.lm.adapter import AdapterLayout
from florilegium.simulation.baselines.context import BaselineContext, Held, Lessons, halves
from florilegium.simulation.evaluation.metrics import Arm


def parts(context: BaselineContext) -> tuple[AdapterLayout, AdapterLayout]:
    """Layouts of the layers that are shared and of those that stay; a whole row is one behind the other."""
    layers = context.layout.layers
    count = min(max(1, round(len(layers) * context.config.baseline.personal_share)), len(layers) - 1)
    return replace(context.layout, layers=layers[:-count]), replace(context.layout, layers=layers[-count:])


def start(context: BaselineContext, devices: int) -> Held:
    width = parts(context)[0].width
    return Held(context.first[:, :width], context.first[:, width:].repeat(devices, 1))


def fedper(held: Held, sets: Lessons, context: BaselineContext) -> tuple[torch.Tensor, torch.Tensor]:
    """All steps on both parts together."""
    whole = torch.cat([held.shared.expand(len(held.own), -1), held.own], 1)  # (K, P)
    base, own = context.train(context.layout, whole, sets).split([held.shared.shape[1], held.own.shape[1]], 1)
    return own, base - held.shared


def fedrep(held: Held, sets: Lessons, context: BaselineContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the steps on the head, then half on the representation."""
    (base_layout, head_layout), (first, second) = parts(context), halves(sets)
    received = context.lm.adapters(base_layout, held.shared)
    own = context.train(head_layout, held.own, first, [received])
    base = context.train(base_layout, held.shared, second, [context.lm.adapters(head_layout, own)])
    return own, base - held.shared


def arm(held: Held, context: BaselineContext) -> Arm:
    base, head = parts(context)
    return [context.lm.adapters(base, held.shared), context.lm.adapters(head, held.own)]
