"""Coins that an audit writes down as a real round tosses them, and tosses again in its worlds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from florilegium.client.coins import Coins, Seeded
from florilegium.client.state import DeviceState
from florilegium.privacy.plan import RoundPlan

Step = tuple[str, int, int]  # of a device, in a round


class Recorded(Coins):
    """Tossed as every device does, each once: whoever asks for one again gets what was written down."""

    def __init__(self) -> None:
        self.secrets: dict[str, int] = {}  # by device
        self.samples: dict[Step, tuple[int, list[int]]] = {}  # of so many slots, those that were drawn
        self.noise_keys: dict[tuple[str, int], int] = {}  # by device and round

    def secret(self, device: str, context: Seeded) -> int:
        if device not in self.secrets:
            self.secrets[device] = super().secret(device, context)
        return self.secrets[device]

    def sample(self, state: DeviceState, count: int, plan: RoundPlan, step: int, context: Seeded) -> list[int]:
        """Of another number of slots than what was written down, anew: that is another question."""
        known, drawn = self.samples.get((state.id, plan.round, step), (-1, []))
        if known != count:
            drawn = super().sample(state, count, plan, step, context)
            self.samples.setdefault((state.id, plan.round, step), (count, drawn))
        return drawn

    def noise_key(self, state: DeviceState, plan: RoundPlan, context: Seeded) -> int:
        known = state.id, plan.round
        if known not in self.noise_keys:
            self.noise_keys[known] = super().noise_key(state, plan, context)
        return self.noise_keys[known]

    @property
    def drawn(self) -> dict[Step, np.ndarray]:
        """(n,) of each step: whether each slot was drawn."""
        return {step: np.isin(np.arange(count), drawn) for step, (count, drawn) in self.samples.items()}

    def pairs(self, axis: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of neighbours in device (0), round (1) or step (2) that share all else, each step in one pair at most.

        Where one has more slots than the other, as many as both have.
        """
        drawn = self.drawn
        lines: dict[tuple[object, ...], list[Step]] = {}
        for step in sorted(drawn):
            lines.setdefault((*step[:axis], *step[axis + 1 :]), []).append(step)
        found = [pair for line in lines.values() for pair in list(pairwise(line))[::2]]
        sizes = [min(len(drawn[a]), len(drawn[b])) for a, b in found]
        return [(drawn[a][:n], drawn[b][:n]) for (a, b), n in zip(found, sizes, strict=True) if n]
