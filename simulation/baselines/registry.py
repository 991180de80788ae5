"""The rivals by name. To add one: its functions in a file of its own, its name in `config.Name`, a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from florilegium.simulation.baselines import fedavg, feddpa, layerwise
from florilegium.simulation.baselines.context import Ground, Held, Lessons
from florilegium.simulation.baselines.ditto import ditto
from florilegium.simulation.baselines.fedalt import arm as fedalt_arm
from florilegium.simulation.baselines.fedalt import fedalt
from florilegium.simulation.baselines.fedalt import start as start_fedalt
from florilegium.simulation.evaluation.metrics import Arm, Queries


@dataclass(frozen=True)
class Rival:
    """A way to personalise: pure functions over a cohort."""

    start: Callable[[Ground, int], Held]  # (ground, number of devices)
    turn: Callable[[Held, Lessons, Ground, int], tuple[Held, torch.Tensor]]  # a round; what each device sent, (K, S)
    arm: Callable[[Held, Ground], Arm]  # what is on when a device is asked: row k of a stack is device k's
    by_query: Callable[[Held, Ground, Queries, Lessons], Arm] | None = None  # in its place: a row for each query


RIVALS = {
    "local": Rival(fedavg.start_local, fedavg.local, fedavg.local_arm),
    "fedavg": Rival(fedavg.start_global, fedavg.fedavg, fedavg.global_arm),
    "fedprox": Rival(fedavg.start_global, fedavg.fedprox, fedavg.global_arm),
    "ours": Rival(fedavg.start_ours, fedavg.ours, fedavg.ours_arm),
    "ditto": Rival(fedavg.start_ours, ditto, fedavg.local_arm),
    "fedper": Rival(layerwise.start, layerwise.fedper, layerwise.arm),
    "fedrep": Rival(layerwise.start, layerwise.fedrep, layerwise.arm),
    "feddpa": Rival(feddpa.start, feddpa.feddpa, feddpa.arm, feddpa.by_query),
    "fedalt": Rival(start_fedalt, fedalt, fedalt_arm),
}
