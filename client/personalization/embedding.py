"""Texts as vectors for small networks: the base's mean hidden states, moved so that a pool's lie about the origin.

Mean hidden states of any two texts are much alike; what tells them apart is what is left beside their common mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from florilegium.client.lm.model import LanguageModel
from florilegium.client.personalization.history import Person
from florilegium.privacy.seeds import derive_seed

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Space:
    """v = (h − center) / scale; without a pool the hidden states as they are."""

    lm: LanguageModel
    center: torch.Tensor | float = 0.0  # (H,)
    scale: float = 1.0

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, H)."""
        return (hidden(self.lm, texts) - self.center) / self.scale


def space(lm: LanguageModel, texts: Sequence[str]) -> Space:
    """In which these texts have mean zero and mean square length 1."""
    found = hidden(lm, texts)
    if not len(found):
        return Space(lm)
    center = found.mean(0)
    return Space(lm, center, max(1e-6, float((found - center).square().sum(1).mean().sqrt())))


def hidden(lm: LanguageModel, texts: Sequence[str]) -> torch.Tensor:
    """Mean hidden states (n, H) of the base, adapters off."""
    if not texts:
        return torch.zeros(0, lm.hidden_size)
    return torch.stack([f.readings["mean"].vector for f in lm.embed(texts)]).float()


def texts_of(people: Sequence[Person]) -> list[str]:
    """What a retriever is given of these people's histories, and what they said."""
    return [text for p in people for past in p.history for text in (past.document, past.example.response)]


def seeded(make: Callable[[], Net], seed: int, *names: str | int) -> Net:
    """A network whose first weights follow from the seed and the names alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, *names))
        return make()
