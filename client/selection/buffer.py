"""The bounded buffer of one device: bins of {domain, text, embedding} that the personal adapter learns from.

`len(buffer) <= capacity` and `size_bytes <= capacity · bin_bytes` after every `offer`. Which one leaves is decided by
a policy (`client.selection.policies`). Not covered: the user's replies, which are asked for later and stored beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from florilegium.client.dialogue import Dialogue
from florilegium.client.selection.config import SelectionConfig
from florilegium.client.selection.entry import QUANTUM, BufferEntry
from florilegium.client.selection.lexicons import Lexicons
from florilegium.client.selection.policies import Policy
from florilegium.client.selection.scores import (
    domain_specific_score,
    dominant_domain,
    entropy_over_dimensions,
    entropy_over_tokens,
    in_domain_dissimilarity,
)
from florilegium.client.selection.stream_memory import StreamMemory, rounded
from florilegium.privacy.common.registry import UnexpectedError, calling, is_extension

if TYPE_CHECKING:
    from florilegium.client.lm.model import Features

AN_INDEX = "return the index of one of the bins, or None"
A_MEMORY = "return the newcomer, a BufferEntry, and a memory of numpy's arrays and numbers by name"


def candidate(dialogue: Dialogue, features: Features, lexicons: Lexicons, config: SelectionConfig) -> BufferEntry:
    """A dialogue that asks for a place, scored except for its dissimilarity, which depends on the buffer."""
    reading = features.readings[config.reading]
    over_tokens = config.entropy == "tokens"
    entropy = entropy_over_tokens(features.token_norms) if over_tokens else entropy_over_dimensions(reading.vector)
    return BufferEntry(
        dialogue.id,
        dialogue.prompt,
        dominant_domain(dialogue.prompt, lexicons),
        reading.vector.half().numpy(),
        1 - rounded(1 - entropy),  # it is nearly 1 for every text
        round(domain_specific_score(dialogue.prompt, lexicons), QUANTUM),
        value=reading.value,
    )


@dataclass(frozen=True)
class Buffer:
    """At most `capacity` bins, in the order of arrival, and what the policy remembers of the stream."""

    config: SelectionConfig
    bins: tuple[BufferEntry, ...] = ()
    memory: StreamMemory = field(default_factory=dict[str, Any])

    def __len__(self) -> int:
        return len(self.bins)

    @property
    def capacity(self) -> float:
        """Bins: as configured, none or without end for the two bounds."""
        return self.config.chosen.capacity(self.config.bins)

    @property
    def size_bytes(self) -> int:
        """Bytes of all bins."""
        return sum(k.size_bytes for k in self.bins)

    def offer(self, newcomer: BufferEntry, rng: np.random.Generator) -> tuple[Buffer, bool]:
        """The buffer after the policy's decision, and whether the newcomer is in it.

        What does not fit a bin, or has a reading that is not a number, is turned away. Raises `ExtensionError` where a
        policy of the user's own raises, or returns something else than what it must.
        """
        policy = self.config.chosen
        if not (np.isfinite(newcomer.embedding).all() and math.isfinite(newcomer.value)):
            return self, False
        newcomer, memory = self._met(policy, newcomer)
        met = replace(self, memory=memory)
        if newcomer.size_bytes > self.config.bin_bytes:
            return met, False
        newcomer = replace(newcomer, idd=_dissimilarity(newcomer, self.bins))
        if len(self.bins) < self.capacity:
            return replace(met, bins=(*self.bins, newcomer)), True
        scored = self._scored()
        with calling(self.config.policy, AN_INDEX):
            again = deepcopy(rng) if is_extension(self.config.policy) else None
            leaves = _index(policy.decide(scored, newcomer, memory, rng), len(scored))
            if again and _index(policy.decide(scored, newcomer, memory, again), len(scored)) != leaves:
                raise UnexpectedError("decided otherwise when it was asked the same again: it must keep nothing")
        if leaves is None:
            return met, False
        return replace(met, bins=(*self.bins[:leaves], *self.bins[leaves + 1 :], newcomer)), True

    def _met(self, policy: Policy, newcomer: BufferEntry) -> tuple[BufferEntry, StreamMemory]:
        """The newcomer and what the policy remembers once it has met it."""
        with calling(self.config.policy, A_MEMORY):
            met = policy.meet(newcomer, self.memory)
            if not _is_met(met):
                raise UnexpectedError(f"returned something else, of type {type(met).__name__}")
            return met

    def _scored(self) -> tuple[BufferEntry, ...]:
        """The bins with the dissimilarity that they came with, or that each has now to the others of its domain."""
        if self.config.dissimilarity == "frozen":
            return self.bins
        return tuple(
            replace(k, idd=_dissimilarity(k, (*self.bins[:i], *self.bins[i + 1 :]))) for i, k in enumerate(self.bins)
        )


def _index(decided: object, bins: int) -> int | None:
    """A policy's decision, which may be an integer of numpy's. Raises `UnexpectedError` for what is none."""
    if decided is None:
        return None
    if isinstance(decided, bool) or not isinstance(decided, int | np.integer):
        raise UnexpectedError(f"returned {decided if isinstance(decided, float) else type(decided).__name__}")
    if not 0 <= decided < bins:
        raise UnexpectedError(f"returned {decided}, of {bins} bins")
    return int(decided)


def _is_met(met: object) -> bool:
    match met:
        case (BufferEntry(), Mapping() as memory):
            return all(isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "biuf" for x in memory.values())
    return False


def _dissimilarity(kept: BufferEntry, others: tuple[BufferEntry, ...]) -> float:
    near = [k.embedding for k in others if k.domain == kept.domain]
    return round(in_domain_dissimilarity(kept.embedding, np.stack(near) if near else np.empty((0, 0))), QUANTUM)
