"""Which examples go through the model together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from florilegium.client.lm.packing import Example

Split = Callable[[Sequence[int], int], list[list[int]]]


def by_tokens(lengths: Sequence[int], even: int = 1) -> Split:
    """Cuts indices, in their order, into groups of at most so many tokens, or of one index.

    Groups of more than `even` indices, but the last, have a multiple of it: so there are few shapes.
    """

    def split(items: Sequence[int], most: int) -> list[list[int]]:
        groups: list[list[int]] = []
        waiting = deque(items)
        while waiting:
            group, room = [waiting.popleft()], most
            room -= lengths[group[0]]
            while waiting and lengths[waiting[0]] <= room:
                room -= lengths[waiting[0]]
                group.append(waiting.popleft())
            while waiting and len(group) > even and len(group) % even:
                waiting.appendleft(group.pop())
            groups.append(group)
        return groups

    return split


def by_device(examples: Sequence[Example], slots: Sequence[int]) -> list[int]:
    """The examples' indices, those of a device together, devices with the most tokens first."""
    tokens: dict[int, int] = {}
    for example, slot in zip(examples, slots, strict=True):
        tokens[slot] = tokens.get(slot, 0) + example.length
    return sorted(range(len(examples)), key=lambda i: (-tokens[slots[i]], slots[i], -examples[i].length))


def schedule(count: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Batches of indices: each epoch a new order of all `count` examples, the last batch may be smaller."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    orders = [rng.permutation(count).tolist() for _ in range(epochs)]
    return [order[i : i + size] for order in orders for i in range(0, count, size)]


def schedule_steps(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` full batches, one random order of all `count` examples after the other; none without examples."""
    if not count:
        return []
    rng = np.random.Generator(np.random.Philox(key=seed))
    wanted = steps * size
    order = np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))]).tolist()
    return [order[i : i + size] for i in range(0, wanted, size)]
