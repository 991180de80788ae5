"""Who leaves a full buffer for a newcomer: one function and one line of the table each.

A policy gets the bins in the order of arrival, the newcomer and the device's own random generator; it returns
the index of the bin that leaves, or None to turn the newcomer away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from client.buffer import Kept

Policy = Callable[[Sequence["Kept"], "Kept", np.random.Generator], int | None]


def quality(bins: Sequence[Kept], newcomer: Kept, rng: np.random.Generator) -> int | None:
    """A random one of those that the newcomer beats on all three scores (Qin et al. 2024, §3.2)."""
    beaten = [i for i, kept in enumerate(bins) if newcomer.dominates(kept)]
    return int(rng.choice(beaten)) if beaten else None


def random(bins: Sequence[Kept], newcomer: Kept, rng: np.random.Generator) -> int | None:
    """Any of the old ones and the newcomer, each as likely to be left out."""
    leaves = int(rng.integers(len(bins) + 1))
    return leaves if leaves < len(bins) else None


def fifo(bins: Sequence[Kept], newcomer: Kept, rng: np.random.Generator) -> int | None:
    """The oldest."""
    return 0


def kcenter(bins: Sequence[Kept], newcomer: Kept, rng: np.random.Generator) -> int | None:
    """One of the two most similar, the later one: what is kept stays spread out in the embedding space."""
    points = torch.stack([k.embedding for k in (*bins, newcomer)]).float()
    unit = torch.nn.functional.normalize(points, dim=1)
    distance = 1 - unit @ unit.T  # (B + 1, B + 1)
    distance.fill_diagonal_(float("inf"))
    nearest = [round(x, 4) for x in distance.min(dim=1).values.tolist()]
    leaves = max(i for i, x in enumerate(nearest) if x == min(nearest))
    return leaves if leaves < len(bins) else None


POLICIES: dict[str, Policy] = {"quality": quality, "random": random, "fifo": fifo, "kcenter": kcenter}
