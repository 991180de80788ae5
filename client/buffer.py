"""The bounded buffer of one device: what it keeps of its stream for the personal adapter.

`len(buffer) <= capacity` after every `offer`. Scores are frozen when a dialogue enters. Which one leaves is
decided by a policy (`client.policies`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from client.dialogue import Dialogue
from client.lexicons import Lexicons
from client.lm.model import Features
from client.policies import POLICIES
from client.scores import domain_specific_score, dominant_domain, entropy_of_embedding, in_domain_dissimilarity

QUANTUM = 4  # decimals of a score: rounding in a batch must not decide what is kept


@dataclass(frozen=True, slots=True)
class Kept:
    """A buffered prompt with its scores. The user's reply to it is not known here."""

    id: str
    prompt: str
    domain: str
    embedding: torch.Tensor  # (H,) float16
    eoe: float
    dss: float
    idd: float = 1.0

    def dominates(self, other: Kept) -> bool:
        """Higher on all three scores."""
        return self.eoe > other.eoe and self.dss > other.dss and self.idd > other.idd


def candidate(dialogue: Dialogue, features: Features, lexicons: Lexicons) -> Kept:
    """A dialogue that asks for a place, scored except for its dissimilarity, which depends on the buffer."""
    return Kept(
        dialogue.id,
        dialogue.prompt,
        dominant_domain(dialogue.prompt, lexicons),
        features.embedding.half(),
        round(entropy_of_embedding(features.token_norms), QUANTUM),
        round(domain_specific_score(dialogue.prompt, lexicons), QUANTUM),
    )


@dataclass(frozen=True)
class Buffer:
    """At most `capacity` bins, in the order of arrival."""

    capacity: int
    policy: str
    bins: tuple[Kept, ...] = ()

    def __len__(self) -> int:
        return len(self.bins)

    def offer(self, newcomer: Kept, rng: np.random.Generator) -> tuple[Buffer, bool]:
        """The buffer after the policy's decision, and whether the newcomer is in it."""
        near = [k.embedding for k in self.bins if k.domain == newcomer.domain]
        newcomer = replace(newcomer, idd=round(in_domain_dissimilarity(newcomer.embedding, near), QUANTUM))
        if len(self.bins) < self.capacity:
            return replace(self, bins=(*self.bins, newcomer)), True
        leaves = POLICIES[self.policy](self.bins, newcomer, rng)
        if leaves is None:
            return self, False
        return replace(self, bins=(*self.bins[:leaves], *self.bins[leaves + 1 :], newcomer)), True
