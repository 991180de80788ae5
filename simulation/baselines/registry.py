"""The baselines by name. To add one: functions in a file of its own, its name in `config.BASELINES`, a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from florilegium.client.lm.adapter import AdapterLayout
from florilegium.privacy.common.registry import resolve
from florilegium.simulation.baselines import fedalt, fedavg, feddpa, layerwise
from florilegium.simulation.baselines.context import BaselineContext, Held, Lessons, aggregate, upload
from florilegium.simulation.baselines.ditto import ditto
from florilegium.simulation.devices.simulated import Own
from florilegium.simulation.evaluation.metrics import Arm, Queries


def keep(held: Held, sets: Lessons, context: BaselineContext) -> torch.Tensor:
    """Nothing is learned on what a round has come to."""
    return held.own


def mean_added(held: Held, sent: torch.Tensor, context: BaselineContext, number: int) -> torch.Tensor:
    """The shared adapter (1, S) with the mean of the changes (K, S) that were sent."""
    return held.shared + aggregate(sent, context, number) if sent.shape[1] else held.shared


def both(context: BaselineContext) -> tuple[AdapterLayout, AdapterLayout]:
    """What is shared and what stays are whole adapters."""
    return context.layout, context.layout


def shared_alone(context: BaselineContext) -> tuple[AdapterLayout, AdapterLayout]:
    """Nothing stays: an adapter of no layers."""
    return context.layout, replace(context.layout, layers=())


@dataclass(frozen=True)
class Baseline:
    """A way to personalise: pure functions over a cohort, before and after a server has made a round of it."""

    start: Callable[[BaselineContext, int], Held]  # (context, number of devices)
    contribute: Callable[[Held, Lessons, BaselineContext], tuple[torch.Tensor, torch.Tensor]]
    # what stays on each device (K, Q), and what it sends (K, S): where nothing else is said, a change of the shared
    arm: Callable[[Held, BaselineContext], Arm]  # what is on when a device is asked: row k of a stack is device k's
    adopt: Callable[[Held, Lessons, BaselineContext], torch.Tensor] = keep  # what stays, after the round
    shares: Callable[[Held, torch.Tensor, BaselineContext, int], torch.Tensor] = mean_added  # what devices get of it
    by_query: Callable[[Held, BaselineContext, Queries, Lessons], Arm] | None = None  # for `arm`: a row for each query
    own: Own = "beside"
    layouts: Callable[[BaselineContext], tuple[AdapterLayout, AdapterLayout]] = both  # shared, own: as they are asked

    def turn(self, held: Held, sets: Lessons, context: BaselineContext, number: int) -> tuple[Held, torch.Tensor]:
        """A round of all devices and their server: what is held after it, and what each device sent, (K, S)."""
        own, changes = self.contribute(held, sets, context)
        sent = upload(changes, context)
        after = Held(self.shares(held, sent, context, number), own)
        return Held(after.shared, self.adopt(after, sets, context)), sent


BASELINES = {
    "local": Baseline(fedavg.start_local, fedavg.local, fedavg.local_arm, own="alone"),
    "fedavg": Baseline(fedavg.start_global, fedavg.fedavg, fedavg.global_arm, own="none", layouts=shared_alone),
    "fedprox": Baseline(fedavg.start_global, fedavg.fedprox, fedavg.global_arm, own="none", layouts=shared_alone),
    "ours": Baseline(fedavg.start_ours, fedavg.ours, fedavg.ours_arm, fedavg.ours_after),
    "ditto": Baseline(fedavg.start_ours, ditto, fedavg.local_arm, own="alone"),
    "fedper": Baseline(layerwise.start, layerwise.fedper, layerwise.arm, layouts=layerwise.parts),
    "fedrep": Baseline(layerwise.start, layerwise.fedrep, layerwise.arm, layouts=layerwise.parts),
    "feddpa": Baseline(
        feddpa.start, feddpa.feddpa, feddpa.arm, feddpa.after, by_query=feddpa.by_query, layouts=feddpa.layouts
    ),
    "fedalt": Baseline(fedalt.start, fedalt.fedalt, fedalt.arm, shares=fedalt.shares),
}


def baseline(name: str) -> Baseline:
    """The baseline of this name, or one of the user's own. Raises `ExtensionError`."""
    return resolve(name, BASELINES, Baseline)
