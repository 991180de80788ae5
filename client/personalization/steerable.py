"""A person's reward, inferred from a few preferences by a neural process, says which reply is chosen.

Few-shot steerable alignment (Kobalczyk et al. 2024, arXiv 2412.13998): an encoder makes of each preference of a
context one vector, and of their mean a Gaussian q(z | context); r(x, y, z) is the reward of a reply, and
p(y⁺ ≻ y⁻) = σ(r(x, y⁺, z) − r(x, y⁻, z)). Trained on a pool's people, each time with another part of a person's
preferences as the context and all as targets, by −E log p + KL(q(z | all) ‖ q(z | context)), z drawn from q(z | all).
A new person's z is the mean of q given all of the history: one reading, nothing is trained.

Unlike the paper's, preferences are a person's replies over those of others, the reward is of the reply alone, by
embeddings of the base, and the model that writes is not conditioned: z decides among its candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from florilegium.client.lm.batching import schedule
from florilegium.client.personalization.against_others import AgainstOthers, Pairs
from florilegium.client.personalization.embedding import seeded
from florilegium.client.personalization.history import Asked
from florilegium.client.personalization.method import MethodContext
from florilegium.privacy.seeds import derive_seed

LATENT, WIDTH = 8, 32


class NeuralProcess(nn.Module):
    """The encoder of preferences and the reward."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(2 * size, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.latent = nn.Linear(WIDTH, 2 * LATENT)
        self.reward_of = nn.Sequential(nn.Linear(size + LATENT, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def infer(self, pairs: Pairs) -> torch.Tensor:
        """Mean and log of the standard deviation (2, Z) of q(z | these preferences); of none that of a mean of 0."""
        found = self.pair(torch.cat([pairs.own, pairs.others], 1))
        mean = found.mean(0) if len(found) else torch.zeros(WIDTH)
        return self.latent(mean).view(2, LATENT)  # type: ignore[no-any-return]

    def reward(self, replies: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """r (n,) of replies (n, H) under z (n, Z)."""
        return self.reward_of(torch.cat([replies, z], 1))[:, 0]  # type: ignore[no-any-return]

    def loss(self, told: Pairs, context: Sequence[int], noise: torch.Tensor) -> torch.Tensor:
        """Of one person, a part of whose preferences are the context; `noise` (Z,) is standard normal."""
        every, some = self.infer(told), self.infer(Pairs(told.own[context], told.others[context]))
        z = (every[0] + every[1].exp() * noise).expand(len(told.own), -1)
        margin = self.reward(told.own, z) - self.reward(told.others, z)
        return -nn.functional.logsigmoid(margin).mean() + divergence(every, some) / len(told.own)


class Steerable(AgainstOthers):
    """The candidate of the greatest reward to the person as inferred."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.process = seeded(lambda: NeuralProcess(context.lm.hidden_size), context.seed, "steerable")
        self.latents = torch.zeros(0, LATENT)  # (K, Z)

    def fit(self, names: Sequence[str], pairs: Sequence[Pairs]) -> None:
        training, seed = self.context.config.training, self.context.seed
        optimizer = torch.optim.AdamW(self.process.parameters(), lr=training.learning_rate, weight_decay=0)
        known = [k for k, p in enumerate(pairs) if len(p.own)]
        rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "steerable")))
        epochs = training.epochs * self.passes(pairs)
        for batch in schedule(len(known), training.batch_size, epochs, derive_seed(seed, "steerable", "order")):
            optimizer.zero_grad()
            losses = []
            for k in (known[i] for i in batch):
                size = int(rng.integers(0, len(pairs[k].own) + 1))
                chosen = rng.permutation(len(pairs[k].own))[:size].tolist()
                noise = torch.tensor(rng.standard_normal(LATENT), dtype=torch.float32)
                losses.append(self.process.loss(pairs[k], chosen, noise))
            torch.stack(losses).mean().backward()
            optimizer.step()

    def passes(self, pairs: Sequence[Pairs]) -> int:
        """Times that a person is met in an epoch: as often as there are preferences on the mean."""
        return max(1, round(sum(len(p.own) for p in pairs) / max(1, len(pairs))))

    @torch.no_grad()
    def meet(self, names: Sequence[str], pairs: Sequence[Pairs]) -> None:
        self.latents = torch.stack([self.process.infer(p)[0] for p in pairs])

    @torch.no_grad()
    def worth(self, asked: Sequence[tuple[int, Asked]], replies: Sequence[str]) -> torch.Tensor:
        found: torch.Tensor = self.process.reward(self.space(replies), self.latents[[k for k, _ in asked]])
        return found

    @property
    def kept_bytes(self) -> float:
        return super().kept_bytes + 4 * LATENT

    @property
    def fetched_bytes(self) -> float:
        return super().fetched_bytes + 4 * sum(p.numel() for p in self.process.parameters())


def divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL of two Gaussians with diagonal covariance, each (2, Z): means, logs of the standard deviations; nats."""
    (m, s), (n, t) = one, other
    found: torch.Tensor = t - s + ((2 * s).exp() + (m - n) ** 2) / (2 * (2 * t).exp()) - 0.5
    return found.sum()
