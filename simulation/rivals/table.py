"""The rivals by name. To add one: its functions in a file of its own, its name in `config.Name`, a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from simulation.evaluate import Arm, Queries
from simulation.rivals import feddpa, layerwise, plain
from simulation.rivals.ditto import ditto
from simulation.rivals.fedalt import arm as fedalt_arm
from simulation.rivals.fedalt import fedalt
from simulation.rivals.fedalt import start as start_fedalt
from simulation.rivals.ground import Ground, Held, Lessons


@dataclass(frozen=True)
class Rival:
    """A way to personalise: pure functions over a cohort."""

    start: Callable[[Ground, int], Held]  # (ground, number of devices)
    turn: Callable[[Held, Lessons, Ground, int], tuple[Held, torch.Tensor]]  # a round; what each device sent, (K, S)
    arm: Callable[[Held, Ground], Arm]  # what is on when a device is asked: row k of a stack is device k's
    by_query: Callable[[Held, Ground, Queries, Lessons], Arm] | None = None  # in its place: a row for each query


RIVALS = {
    "local": Rival(plain.start_local, plain.local, plain.local_arm),
    "fedavg": Rival(plain.start_global, plain.fedavg, plain.global_arm),
    "fedprox": Rival(plain.start_global, plain.fedprox, plain.global_arm),
    "ours": Rival(plain.start_ours, plain.ours, plain.ours_arm),
    "ditto": Rival(plain.start_ours, ditto, plain.local_arm),
    "fedper": Rival(layerwise.start, layerwise.fedper, layerwise.arm),
    "fedrep": Rival(layerwise.start, layerwise.fedrep, layerwise.arm),
    "feddpa": Rival(feddpa.start, feddpa.feddpa, feddpa.arm, feddpa.by_query),
    "fedalt": Rival(start_fedalt, fedalt, fedalt_arm),
}
