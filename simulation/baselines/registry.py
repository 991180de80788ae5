"""The rivals by name. To add one: its functions in a file of its own, its name in `config.NAMES`, a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from florilegium.privacy.common.registry import resolve
from florilegium.simulation.baselines import fedavg, feddpa, layerwise
from florilegium.simulation.baselines.context import BaselineContext, Held, Lessons
from florilegium.simulation.baselines.ditto import ditto
from florilegium.simulation.baselines.fedalt import arm as fedalt_arm
from florilegium.simulation.baselines.fedalt import fedalt
from florilegium.simulation.baselines.fedalt import start as start_fedalt
from florilegium.simulation.evaluation.metrics import Arm, Queries


@dataclass(frozen=True)
class Baseline:
    """A way to personalise: pure functions over a cohort."""

    start: Callable[[BaselineContext, int], Held]  # (ground, number of devices)
    turn: Callable[
        [Held, Lessons, BaselineContext, int], tuple[Held, torch.Tensor]
    ]  # a round; what each device sent, (K, S)
    arm: Callable[[Held, BaselineContext], Arm]  # what is on when a device is asked: row k of a stack is device k's
    by_query: Callable[[Held, BaselineContext, Queries, Lessons], Arm] | None = (
        None  # in its place: a row for each query
    )


BASELINES = {
    "local": Baseline(fedavg.start_local, fedavg.local, fedavg.local_arm),
    "fedavg": Baseline(fedavg.start_global, fedavg.fedavg, fedavg.global_arm),
    "fedprox": Baseline(fedavg.start_global, fedavg.fedprox, fedavg.global_arm),
    "ours": Baseline(fedavg.start_ours, fedavg.ours, fedavg.ours_arm),
    "ditto": Baseline(fedavg.start_ours, ditto, fedavg.local_arm),
    "fedper": Baseline(layerwise.start, layerwise.fedper, layerwise.arm),
    "fedrep": Baseline(layerwise.start, layerwise.fedrep, layerwise.arm),
    "feddpa": Baseline(feddpa.start, feddpa.feddpa, feddpa.arm, feddpa.by_query),
    "fedalt": Baseline(start_fedalt, fedalt, fedalt_arm),
}


def baseline(name: str) -> Baseline:
    """The baseline of this name, or one of the user's own. Raises `ExtensionError`."""
    return resolve(name, BASELINES, Baseline)
