"""What is worth choosing for whom: a trunk that all people share, and a head for each (the factorisation of HYDRA).

p(chosen | x, u) = σ(w_u · f(x) + b_u), f one layer with tanh; the loss is the binary cross-entropy. Trunk and heads
are trained on a pool's people; of somebody new the trunk stays as it is and the head alone is trained, from the mean
of the pool's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from florilegium.client.lm.batching import schedule
from florilegium.client.personalization.config import TrainingConfig
from florilegium.client.personalization.embedding import seeded

WIDTH = 16  # of what the trunk makes of a pair


@dataclass(frozen=True)
class Judged:
    """Pairs of vectors, and whether the second one of each was right for the first."""

    pairs: torch.Tensor  # (n, 2, H)
    labels: torch.Tensor  # (n,), 0 or 1


def joined(judged: Sequence[Judged]) -> Judged:
    return Judged(torch.cat([j.pairs for j in judged]), torch.cat([j.labels for j in judged]))


class SharedTrunk(nn.Module):
    """f: two vectors and their product → `WIDTH` numbers, and the mean of the pool's heads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * size, WIDTH)
        self.mean_head = nn.Parameter(torch.zeros(WIDTH + 1), requires_grad=False)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """(n, 2, H) → (n, WIDTH)."""
        one, other = pairs.unbind(1)
        return torch.tanh(self.layer(torch.cat([one, other, one * other], 1)))


def trunk(size: int, seed: int, name: str) -> SharedTrunk:
    return seeded(lambda: SharedTrunk(size), seed, "trunk", name)


def logits(features: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """w · f + b (n,) of features (n, D) under heads (n, D + 1) or (D + 1,)."""
    return (features * heads[..., :-1]).sum(-1) + heads[..., -1]


def learn_trunk(shared: SharedTrunk, judged: Sequence[Judged], training: TrainingConfig, seed: int) -> torch.Tensor:
    """Trains the trunk with a head for each person of the pool; the heads (K, D + 1)."""
    owners = torch.tensor([k for k, own in enumerate(judged) for _ in own.labels], dtype=torch.long)
    heads = nn.Parameter(torch.zeros(len(judged), WIDTH + 1))
    if len(owners):
        every = joined(judged)
        optimizer = torch.optim.AdamW([*shared.layer.parameters(), heads], lr=training.learning_rate, weight_decay=0)
        for batch in schedule(len(owners), training.batch_size, training.epochs, seed):
            found = logits(shared(every.pairs[batch]), heads[owners[batch]])
            _descend(optimizer, found, every.labels[batch])
        shared.mean_head.copy_(heads.detach().mean(0))
    return heads.detach()


def learn_head(shared: SharedTrunk, judged: Judged, training: TrainingConfig, seed: int) -> torch.Tensor:
    """The head (D + 1,) of one person, the trunk as it is."""
    head = nn.Parameter(shared.mean_head.clone())
    if len(judged.labels):
        with torch.no_grad():
            features = shared(judged.pairs)
        optimizer = torch.optim.AdamW([head], lr=training.learning_rate, weight_decay=0)
        for batch in schedule(len(judged.labels), training.batch_size, training.epochs, seed):
            _descend(optimizer, logits(features[batch], head), judged.labels[batch])
    return head.detach()


def _descend(optimizer: torch.optim.Optimizer, found: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(found, labels).backward()
    optimizer.step()
