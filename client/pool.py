"""The uniform pool that the shared adapter learns from (Vitter 1985, algorithm R).

Its coins do not look at the data: whether a dialogue is in the pool depends on when it came, not on what it or
any other says. So one dialogue cannot change which others are trained on, and a full pool takes one in by
dropping another, which is why its privacy is accounted for as "replace one".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from florilegium.privacy.seeds import derive_key


@dataclass(frozen=True)
class Pool:
    """`capacity` public slots; `seen` dialogues have been offered so far."""

    capacity: int
    slots: tuple[tuple[str, str], ...] = ()  # (id, prompt)
    seen: int = 0

    def offer(self, identity: str, prompt: str, secret: int) -> Pool:
        """After n offers each of them is in the pool with probability min(1, capacity / n)."""
        seen = self.seen + 1
        if len(self.slots) < self.capacity:
            return replace(self, slots=(*self.slots, (identity, prompt)), seen=seen)
        slot = int(np.random.Generator(np.random.Philox(key=derive_key(secret, "pool", seen))).integers(seen))
        if slot >= self.capacity:
            return replace(self, seen=seen)
        slots = (*self.slots[:slot], (identity, prompt), *self.slots[slot + 1 :])
        return replace(self, slots=slots, seen=seen)

    def resized(self, capacity: int, secret: int) -> Pool:
        """With so many slots; of more than that, coins choose those that stay."""
        order = np.random.Generator(np.random.Philox(key=derive_key(secret, "resized", self.seen))).permutation(
            len(self.slots)
        )
        kept = sorted(order[:capacity].tolist())
        return replace(self, capacity=capacity, slots=tuple(self.slots[i] for i in kept))

    def only(self, identities: frozenset[str]) -> Pool:
        """Without the dialogues that are retired: which ones depends on how often each was paid for, not on texts."""
        return replace(self, slots=tuple(s for s in self.slots if s[0] in identities))


def poisson_sample(count: int, rate: float, key: int) -> list[int]:
    """Each of so many with probability `rate`, by a coin of its own: more or fewer others do not change it."""
    coins = np.random.Generator(np.random.Philox(key=key)).random(count)
    return [i for i, coin in enumerate(coins) if coin < rate]
