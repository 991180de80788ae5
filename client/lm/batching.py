"""Which examples go through the model together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

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
