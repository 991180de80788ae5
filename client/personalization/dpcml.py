"""Several embeddings for each person in one metric space, for whoever has several interests (after DPCML).

With u_1 … u_C the vectors of a person and v the projected embedding of a reply, all in the unit ball (DPCML, Bao et
al. 2022, arXiv 2209.15292): s(u, v) = min_c ‖u_c − v‖², and a reply v⁺ of the person's and one v⁻ of somebody else's
cost [λ + s(u, v⁺) − s(u, v⁻)]₊. The diversity term keeps a person's vectors neither the same nor anywhere: with
δ_u = Σ_{c ≠ c'} ‖u_c − u_c'‖² / (2 C (C − 1)) it is η ([δ₁ − δ_u]₊ + [δ_u − δ₂]₊).

Unlike the paper's, items are replies of which nobody else's is known: v is a projection of their embeddings, learned
from a pool's people and shared, in the place of a vector for each item; negatives are drawn, one a positive, and not
searched for the hardest. Of the candidates the one with the least s is said.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from florilegium.client.lm.batching import schedule
from florilegium.client.personalization.against_others import AgainstOthers, Pairs
from florilegium.client.personalization.embedding import seeded
from florilegium.client.personalization.history import Asked
from florilegium.client.personalization.method import MethodContext
from florilegium.privacy.seeds import derive_seed

VECTORS, WIDTH = 3, 16  # of a person; numbers of a vector
MARGIN, DIVERSITY = 0.5, 0.1  # λ, η
LEAST_APART, MOST_APART = 0.1, 0.5  # δ₁, δ₂


class Dpcml(AgainstOthers):
    """The candidate that is nearest to any of a person's vectors."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.projection = seeded(lambda: nn.Linear(context.lm.hidden_size, WIDTH), context.seed, "dpcml")
        self.vectors = torch.zeros(0, VECTORS, WIDTH)  # (K, C, D)

    def fit(self, names: Sequence[str], pairs: Sequence[Pairs]) -> None:
        self._train(self._start(names), pairs, names, [*self.projection.parameters()])

    def meet(self, names: Sequence[str], pairs: Sequence[Pairs]) -> None:
        """The projection stays as it is."""
        start = self._start(names)
        one_by_one = zip(start.split(1), pairs, names, strict=True)
        self.vectors = torch.cat([self._train(own, [p], [name], []) for own, p, name in one_by_one])

    @torch.no_grad()
    def worth(self, asked: Sequence[tuple[int, Asked]], replies: Sequence[str]) -> torch.Tensor:
        whose = self.vectors[[k for k, _ in asked]]
        return -distances(whose, in_ball(self.projection(self.space(replies))))

    @property
    def kept_bytes(self) -> float:
        return super().kept_bytes + 4 * VECTORS * WIDTH

    @property
    def fetched_bytes(self) -> float:
        return super().fetched_bytes + 4 * sum(p.numel() for p in self.projection.parameters())

    def _start(self, names: Sequence[str]) -> torch.Tensor:
        """(K, C, D) at random within the ball."""
        generators = [torch.Generator().manual_seed(derive_seed(self.context.seed, n, "dpcml") >> 1) for n in names]
        return torch.stack([torch.randn(VECTORS, WIDTH, generator=g) / WIDTH**0.5 / 2 for g in generators])

    def _train(
        self, start: torch.Tensor, pairs: Sequence[Pairs], names: Sequence[str], shared: Sequence[nn.Parameter]
    ) -> torch.Tensor:
        """Vectors (K, C, D) after training, with what is shared, if anything is."""
        training, vectors = self.context.config.training, nn.Parameter(start.clone())
        owners = [k for k, p in enumerate(pairs) for _ in p.own]
        own, others = torch.cat([p.own for p in pairs]), torch.cat([p.others for p in pairs])
        optimizer = torch.optim.AdamW([vectors, *shared], lr=training.learning_rate, weight_decay=0)
        order = derive_seed(self.context.seed, *names[:1], "dpcml", "order")
        for batch in schedule(len(owners), training.batch_size, training.epochs, order):
            whose = in_ball(vectors)[[owners[i] for i in batch]]
            near, far = (in_ball(self.projection(v[batch])) for v in (own, others))
            optimizer.zero_grad()
            loss(whose, near, far).backward()
            optimizer.step()
        return in_ball(vectors.detach())


def loss(vectors: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    """The mean over pairs: vectors (n, C, D) of their people, replies of theirs (n, D) and of others (n, D)."""
    hinge = (MARGIN + distances(vectors, near) - distances(vectors, far)).relu()
    apart = spread(vectors)
    return (hinge + DIVERSITY * ((LEAST_APART - apart).relu() + (apart - MOST_APART).relu())).mean()


def distances(vectors: torch.Tensor, replies: torch.Tensor) -> torch.Tensor:
    """s (n,) of vectors (n, C, D) and replies (n, D): squared, to the nearest."""
    return (vectors - replies[:, None]).square().sum(2).amin(1)


def spread(vectors: torch.Tensor) -> torch.Tensor:
    """δ (n,) of vectors (n, C, D)."""
    count = vectors.shape[1]
    between = (vectors[:, :, None] - vectors[:, None]).square().sum(3)
    return between.sum((1, 2)) / (2 * count * (count - 1))


def in_ball(vectors: torch.Tensor) -> torch.Tensor:
    """With those outside of the unit ball brought back to its surface."""
    size: torch.Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / size.clamp(min=1)
