"""Soft prompts of many devices as rows of one matrix (prompt tuning, Lester et al. 2021, arXiv 2104.08691).

A device has the embeddings of some virtual tokens, which stand before everything else. Their ids are those behind the
vocabulary's: V, V + 1, …; the layer that looks embeddings up takes them from the device that a token belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from florilegium.client.lm.packing import Example, Rectangle


@dataclass(frozen=True)
class PromptLayout:
    """`tokens` embeddings of `hidden` numbers each, one behind the other."""

    tokens: int
    hidden: int
    vocabulary: torch.Tensor = field(repr=False, compare=False)  # (V, hidden), where a new device's are drawn from

    @property
    def width(self) -> int:
        """P, the number of trained parameters of one device."""
        return self.tokens * self.hidden

    def start(self, seed: int) -> torch.Tensor:
        """A new device's row (P,): embeddings of random words, which the paper found better than random numbers."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.vocabulary), (self.tokens,), generator=generator)
        return self.vocabulary[chosen.to(self.vocabulary.device)].float().cpu().flatten()


def behind(prompt: PromptLayout, examples: Sequence[Example]) -> list[Example]:
    """The examples with the prompt's virtual tokens before them."""
    ids, size = tuple(range(len(prompt.vocabulary), len(prompt.vocabulary) + prompt.tokens)), prompt.tokens
    return [Example((*ids, *e.prompt), e.reply, (e.words[0] + size, e.words[1] + size), e.truncated) for e in examples]


class AdaptedEmbedding(nn.Module):
    """A frozen table of embeddings, and behind it the virtual tokens of the devices that are active."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base
        self.active: list[
            tuple[torch.Tensor, Rectangle]
        ] = []  # at most one: (K, tokens, H), and whose tokens are whose

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (1, N) → (1, N, H)."""
        if not self.active:
            return self.base(ids)  # type: ignore[no-any-return]
        (prompts, owned), virtual = self.active[0], ids[0] >= self.base.num_embeddings
        found = self.base(ids.masked_fill(virtual[None], 0))
        owners, places = owned.owners(ids.shape[1])[virtual], ids[0][virtual] - self.base.num_embeddings
        return found.index_put((torch.zeros_like(places), virtual.nonzero().flatten()), prompts[owners, places])  # type: ignore[no-any-return]
