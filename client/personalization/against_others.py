"""Methods that learn what a person would say by setting it against what others have said, and choose by that.

Each of a person's replies is set against one of somebody in the pool, drawn at random. The pool's replies, as
embeddings, are fetched by every device: they have to be public.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from florilegium.client.personalization.choosing import Choosing
from florilegium.client.personalization.embedding import Space, space
from florilegium.client.personalization.history import Person
from florilegium.client.personalization.method import MethodContext
from florilegium.privacy.seeds import derive_seed


@dataclass(frozen=True)
class Pairs:
    """Embeddings of a person's replies, and of somebody else's that each is set against."""

    own: torch.Tensor  # (n, H)
    others: torch.Tensor  # (n, H)


class AgainstOthers(Choosing):
    """Of the candidates the one that is most like what the person says, and least like what others do."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.space = Space(context.lm)
        self.whose: list[str] = []  # whose each of the pool's replies is
        self.said = torch.zeros(0, context.lm.hidden_size)  # the pool's replies (N, H)

    @abstractmethod
    def fit(self, names: Sequence[str], pairs: Sequence[Pairs]) -> None:
        """Learns what is shared, from people who are not evaluated."""

    @abstractmethod
    def meet(self, names: Sequence[str], pairs: Sequence[Pairs]) -> None:
        """Learns, or infers, what is each person's own."""

    def learn(self, others: Sequence[Person]) -> None:
        super().prepare(others)
        texts = [past.example.response for p in others for past in p.history]
        self.whose = [p.owner for p in others for _ in p.history]
        self.space = space(self.context.lm, texts)
        self.said = self.space(texts)
        self.fit([p.id for p in others], [self.pairs(p) for p in others])

    def prepare(self, people: Sequence[Person]) -> None:
        super().prepare(people)
        if self.whose:
            self.count(read=self.texts_tokens([past.example.response for p in people for past in p.history]))
            self.meet([p.id for p in people], [self.pairs(p) for p in people])

    def pairs(self, person: Person) -> Pairs:
        """One of each of the person's replies; none where the pool has nobody else."""
        own = self.space([past.example.response for past in person.history])
        there = [i for i, who in enumerate(self.whose) if who != person.owner]
        if not there:
            return Pairs(own[:0], own[:0])
        rng = np.random.Generator(np.random.Philox(key=derive_seed(self.context.seed, person.id, "others")))
        return Pairs(own, self.said[rng.choice(there, size=len(own)).tolist()])

    @property
    def fetched_bytes(self) -> float:
        """The pool's replies as embeddings."""
        return 4.0 * self.said.numel()
